// XXH3-64 (default secret, seed 0) over many blocks, on the way of a copy where there is one.
//
// A copy out of another worker's memory waits for memory; the hash needs a few operations for each cache line that
// passes through the registers anyway. Algorithm: the xxHash specification, XXH3, inputs of more than 240 bytes.
#include <cstdint>
#include <cstring>

#include "../native/export.h"

#include <immintrin.h>

namespace {

constexpr uint64_t P32_1 = 0x9E3779B1U, P32_2 = 0x85EBCA77U, P32_3 = 0xC2B2AE3DU;
constexpr uint64_t P64_1 = 0x9E3779B185EBCA87ULL, P64_2 = 0xC2B2AE3D27D4EB4FULL, P64_3 = 0x165667B19E3779F9ULL,
                   P64_4 = 0x85EBCA77C2B2AE63ULL, P64_5 = 0x27D4EB2F165667C5ULL;
constexpr int64_t STRIPE = 64, STRIPES_PER_BLOCK = 16, BLOCK = STRIPE * STRIPES_PER_BLOCK, LAST_SECRET = 192 - 64;

alignas(64) constexpr uint64_t SECRET_WORDS[24] = {
    0xbe4ba423396cfeb8, 0x1cad21f72c81017c, 0xdb979083e96dd4de, 0x1f67b3b7a4a44072,
    0x78e5c0cc4ee679cb, 0x2172ffcc7dd05a82, 0x8e2443f7744608b8, 0x4c263a81e69035e0,
    0xcb00c391bb52283c, 0xa32e531b8b65d088, 0x4ef90da297486471, 0xd8acdea946ef1938,
    0x3f349ce33f76faa8, 0x1d4f0bc7c7bbdcf9, 0x3159b4cd4be0518a, 0x647378d9c97e9fc8,
    0xc3ebd33483acc5ea, 0xeb6313faffa081c5, 0x49daf0b751dd0d17, 0x9e68d429265516d3,
    0xfca1477d58be162b, 0xce31d07ad1b8f88f, 0x280416958f3acb45, 0x7e404bbbcafbd7af,
};
const uint8_t* const SECRET = reinterpret_cast<const uint8_t*>(SECRET_WORDS);

uint64_t read64(const uint8_t* at) {
    uint64_t word;
    memcpy(&word, at, sizeof word);
    return word;
}

uint64_t fold(uint64_t a, uint64_t b) {
    const unsigned __int128 product = static_cast<unsigned __int128>(a) * b;
    return static_cast<uint64_t>(product) ^ static_cast<uint64_t>(product >> 64);
}

uint64_t merged(const uint64_t* acc, int64_t nbytes) {
    uint64_t sum = static_cast<uint64_t>(nbytes) * P64_1;
    for (int i = 0; i < 4; ++i)
        sum += fold(acc[2 * i] ^ read64(SECRET + 11 + 16 * i), acc[2 * i + 1] ^ read64(SECRET + 19 + 16 * i));
    sum ^= sum >> 37;
    sum *= 0x165667919E3779F9ULL;
    return sum ^ (sum >> 32);
}

constexpr uint64_t START[8] = {P32_3, P64_1, P64_2, P64_3, P64_4, P32_2, P64_5, P32_1};

// Each lane type below offers: Acc, start(), accumulate(acc, in, secret, out), scramble(acc), store(acc, words).
// `out` is where the stripe is copied to; null for none.
struct Narrow {
    struct Acc {
        __m256i half[2];
    };
    static __m256i load(const void* at) { return _mm256_loadu_si256(static_cast<const __m256i*>(at)); }
    static Acc start() { return {{load(START), load(START + 4)}}; }
    static void accumulate(Acc& acc, const uint8_t* in, const uint8_t* secret, uint8_t* out) {
        for (int i = 0; i < 2; ++i) {
            const __m256i word = load(in + 32 * i);
            if (out) _mm256_storeu_si256(reinterpret_cast<__m256i*>(out + 32 * i), word);
            const __m256i key = _mm256_xor_si256(word, load(secret + 32 * i));
            const __m256i product = _mm256_mul_epu32(key, _mm256_srli_epi64(key, 32));
            const __m256i swapped = _mm256_shuffle_epi32(word, _MM_SHUFFLE(1, 0, 3, 2));
            acc.half[i] = _mm256_add_epi64(acc.half[i], _mm256_add_epi64(product, swapped));
        }
    }
    static void scramble(Acc& acc) {
        const __m256i prime = _mm256_set1_epi64x(P32_1);
        for (int i = 0; i < 2; ++i) {
            __m256i mixed = _mm256_xor_si256(acc.half[i], _mm256_srli_epi64(acc.half[i], 47));
            mixed = _mm256_xor_si256(mixed, load(SECRET + LAST_SECRET + 32 * i));
            const __m256i high = _mm256_mul_epu32(_mm256_srli_epi64(mixed, 32), prime);
            acc.half[i] = _mm256_add_epi64(_mm256_mul_epu32(mixed, prime), _mm256_slli_epi64(high, 32));
        }
    }
    static void store(const Acc& acc, uint64_t* words) { memcpy(words, &acc, sizeof acc); }
};

#if defined(__AVX512F__)
// `Streaming`: stores go past the caches, which a block that nobody reads soon would only fill; `out` is aligned.
template <bool Streaming>
struct Wide {
    using Acc = __m512i;
    static Acc start() { return _mm512_loadu_si512(START); }
    static void accumulate(Acc& acc, const uint8_t* in, const uint8_t* secret, uint8_t* out) {
        const __m512i word = _mm512_loadu_si512(in);
        if (out) {
            if (Streaming)
                _mm512_stream_si512(reinterpret_cast<__m512i*>(out), word);
            else
                _mm512_storeu_si512(out, word);
        }
        const __m512i key = _mm512_xor_si512(word, _mm512_loadu_si512(secret));
        const __m512i product = _mm512_mul_epu32(key, _mm512_srli_epi64(key, 32));
        const __m512i swapped = _mm512_shuffle_epi32(word, _MM_PERM_BADC);
        acc = _mm512_add_epi64(acc, _mm512_add_epi64(product, swapped));
    }
    static void scramble(Acc& acc) {
        const __m512i mixed = _mm512_xor_si512(_mm512_xor_si512(acc, _mm512_srli_epi64(acc, 47)),
                                               _mm512_loadu_si512(SECRET + LAST_SECRET));
        const __m512i prime = _mm512_set1_epi64(P32_1);
        const __m512i high = _mm512_mul_epu32(_mm512_srli_epi64(mixed, 32), prime);
        acc = _mm512_add_epi64(_mm512_mul_epu32(mixed, prime), _mm512_slli_epi64(high, 32));
    }
    static void store(const Acc& acc, uint64_t* words) { _mm512_storeu_si512(words, acc); }
};
#endif

template <class Lanes>
uint64_t hash(const uint8_t* in, int64_t nbytes, uint8_t* out) {
    typename Lanes::Acc acc = Lanes::start();
    const int64_t blocks = (nbytes - 1) / BLOCK;
    for (int64_t block = 0; block < blocks; ++block) {
        const int64_t at = block * BLOCK;
        for (int64_t n = 0; n < STRIPES_PER_BLOCK; ++n)
            Lanes::accumulate(acc, in + at + n * STRIPE, SECRET + 8 * n, out ? out + at + n * STRIPE : nullptr);
        Lanes::scramble(acc);
    }
    const int64_t stripes = (nbytes - 1 - blocks * BLOCK) / STRIPE;
    for (int64_t n = 0; n < stripes; ++n) {
        const int64_t at = blocks * BLOCK + n * STRIPE;
        Lanes::accumulate(acc, in + at, SECRET + 8 * n, out ? out + at : nullptr);
    }
    // The last stripe ends with the input and may overlap the one before it.
    const int64_t done = blocks * BLOCK + stripes * STRIPE;
    if (out) memcpy(out + done, in + done, static_cast<size_t>(nbytes - done));
    Lanes::accumulate(acc, in + nbytes - STRIPE, SECRET + LAST_SECRET - 7, nullptr);
    uint64_t words[8];
    Lanes::store(acc, words);
    return merged(words, nbytes);
}

uint64_t digest(const uint8_t* in, int64_t nbytes, uint8_t* out) {
#if defined(__AVX512F__)
    if (out && reinterpret_cast<uintptr_t>(out) % 64 == 0) return hash<Wide<true>>(in, nbytes, out);
    return hash<Wide<false>>(in, nbytes, out);
#else
    return hash<Narrow>(in, nbytes, out);
#endif
}

}  // namespace

// digests[i] = XXH3-64 of the nbytes[i] (more than 240) bytes at source + from[i], copied to target + to[i] on the way
// unless `target` is null.
EXPORT void penstock_digest(int64_t count, const uint8_t* source, const int64_t* from, uint8_t* target,
                            const int64_t* to, const int64_t* nbytes, uint64_t* digests) {
    for (int64_t i = 0; i < count; ++i)
        digests[i] = digest(source + from[i], nbytes[i], target ? target + to[i] : nullptr);
    _mm_sfence();  // streamed bytes are in memory before anybody is told of them
}
