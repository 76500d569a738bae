#include "cpu.h"

#include "../native/export.h"
#include "../native/team.h"

namespace penstock {
namespace {

#if defined(__AVX512VNNI__)

using Wholes = __m512i;
inline Wholes no_wholes() { return _mm512_setzero_si512(); }
inline Floats to_floats(Wholes v) { return _mm512_cvtepi32_ps(v); }
using Bytes = __m512i;
inline Bytes load_codes(const uint8_t* at) { return _mm512_loadu_si512(at); }
inline Bytes low_halves(Bytes v) { return _mm512_and_si512(v, _mm512_set1_epi8(15)); }
inline Bytes high_halves(Bytes v) { return _mm512_and_si512(_mm512_srli_epi16(v, 4), _mm512_set1_epi8(15)); }
template <int Bits>
inline Wholes dot4(Wholes into, Bytes codes, const int8_t* q) {
    int32_t four;
    memcpy(&four, q, sizeof four);
    return _mm512_dpbusd_epi32(into, codes, _mm512_set1_epi32(four));
}

#else

struct Wholes {
    __m256i low, high;
};
inline Wholes no_wholes() { return {_mm256_setzero_si256(), _mm256_setzero_si256()}; }
inline Floats to_floats(Wholes v) { return {_mm256_cvtepi32_ps(v.low), _mm256_cvtepi32_ps(v.high)}; }
struct Bytes {
    __m256i low, high;
};
inline __m256i load32(const uint8_t* at) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(at)); }
inline Bytes load_codes(const uint8_t* at) { return {load32(at), load32(at + 32)}; }
inline __m256i low_half(__m256i v) { return _mm256_and_si256(v, _mm256_set1_epi8(15)); }
inline Bytes low_halves(Bytes v) { return {low_half(v.low), low_half(v.high)}; }
inline Bytes high_halves(Bytes v) {
    return {low_half(_mm256_srli_epi16(v.low, 4)), low_half(_mm256_srli_epi16(v.high, 4))};
}
// Pairs are added in 16 bits, which saturate: of an 8-bit code the lowest seven bits and the highest go apart.
template <int Bits>
inline __m256i dot4_half(__m256i into, __m256i codes, __m256i q) {
    const __m256i ones = _mm256_set1_epi16(1);
    if (Bits == 4) return _mm256_add_epi32(into, _mm256_madd_epi16(_mm256_maddubs_epi16(codes, q), ones));
    const __m256i top = _mm256_set1_epi8(-128);
    const __m256i rest = _mm256_maddubs_epi16(_mm256_andnot_si256(top, codes), q);
    const __m256i tops = _mm256_maddubs_epi16(_mm256_and_si256(top, codes), q);
    into = _mm256_add_epi32(into, _mm256_madd_epi16(rest, ones));
    return _mm256_add_epi32(into, _mm256_madd_epi16(tops, ones));
}
template <int Bits>
inline Wholes dot4(Wholes into, Bytes codes, const int8_t* q) {
    int32_t four;
    memcpy(&four, q, sizeof four);
    const __m256i wide = _mm256_set1_epi32(four);
    return {dot4_half<Bits>(into.low, codes.low, wide), dot4_half<Bits>(into.high, codes.high, wide)};
}

#endif

// The eight vectors of codes of one group, four inputs of sixteen outputs each.
template <int Bits>
struct GroupCodes {
    Bytes four[8];
    explicit GroupCodes(const uint8_t* at) {
        if (Bits == 4) {
            for (int j = 0; j < 4; ++j) {
                const Bytes both = load_codes(at + 64 * j);
                four[2 * j] = low_halves(both);
                four[2 * j + 1] = high_halves(both);
            }
        } else {
            for (int j = 0; j < 8; ++j) four[j] = load_codes(at + 64 * j);
        }
    }
};

constexpr int64_t AHEAD = 4096;  // bytes; weights follow each other in the order in which they are read

template <int Bits, int Rows>
inline void multiply_rows(const Matrix& weight, const uint8_t* at, const Codes& from, float* out, int64_t stride,
                          const float* bias, bool adds) {
    constexpr int64_t CODES = BLOCK_OUTS * GROUP * Bits / 8;
    const int64_t groups = weight.groups(), ins = weight.ins;
    Floats total[Rows];
    for (int r = 0; r < Rows; ++r) total[r] = bias ? load(bias) : zeros();
    for (int64_t group = 0; group < groups; ++group, at += CODES + 64) {
        for (int64_t line = 0; line < CODES + 64; line += 64)
            _mm_prefetch(reinterpret_cast<const char*>(at + AHEAD + line), _MM_HINT_T0);
        const GroupCodes<Bits> codes(at);
        const auto* scales = reinterpret_cast<const uint16_t*>(at + CODES);
        const Floats d = load_half(scales), m = load_half(scales + 16);
        Wholes whole[Rows];
        for (int r = 0; r < Rows; ++r) whole[r] = no_wholes();
#pragma GCC unroll 8
        for (int j = 0; j < 8; ++j)
#pragma GCC unroll 8
            for (int r = 0; r < Rows; ++r)
                whole[r] = dot4<Bits>(whole[r], codes.four[j], from.q + r * ins + group * GROUP + 4 * j);
#pragma GCC unroll 8
        for (int r = 0; r < Rows; ++r) {
            total[r] = fma(mul(to_floats(whole[r]), all(from.scale[r * groups + group])), d, total[r]);
            total[r] = fma(m, all(from.shift[r * groups + group]), total[r]);
        }
    }
    for (int r = 0; r < Rows; ++r) store(out + r * stride, adds ? add(load(out + r * stride), total[r]) : total[r]);
}

template <int Bits>
void multiply(const Matrix& weight, int64_t block, const Codes& from, int64_t rows, float* out, int64_t stride,
              bool adds) {
    const uint8_t* at = weight.block(block);
    const float* bias = weight.bias ? weight.bias + block * BLOCK_OUTS : nullptr;
    out += block * BLOCK_OUTS;
    int64_t row = 0;
    for (; row + 8 <= rows; row += 8)
        multiply_rows<Bits, 8>(weight, at, from.from(row), out + row * stride, stride, bias, adds);
    for (; row + 4 <= rows; row += 4)
        multiply_rows<Bits, 4>(weight, at, from.from(row), out + row * stride, stride, bias, adds);
    for (; row + 2 <= rows; row += 2)
        multiply_rows<Bits, 2>(weight, at, from.from(row), out + row * stride, stride, bias, adds);
    if (row < rows) multiply_rows<Bits, 1>(weight, at, from.from(row), out + row * stride, stride, bias, adds);
}

}  // namespace

void quantize_row(const float* x, const Codes& to) {
    for (int64_t group = 0; group < to.ins / GROUP; ++group, x += GROUP) {
        const Floats a = load(x), b = load(x + LANES);
        const float most = largest(larger(magnitude(a), magnitude(b)));
        const float inverse = most > 0 ? 127.0f / most : 0.0f;
        const Floats qa = nearest(mul(a, all(inverse))), qb = nearest(mul(b, all(inverse)));
        store_bytes(to.q + group * GROUP, qa);
        store_bytes(to.q + group * GROUP + LANES, qb);
        const float scale = most / 127.0f;
        to.scale[group] = scale;
        to.shift[group] = scale * sum(add(qa, qb));
    }
}

void multiply_block(const Matrix& weight, int64_t block, const Codes& from, int64_t rows, float* out, int64_t stride,
                    bool adds) {
    if (weight.bits == 4)
        multiply<4>(weight, block, from, rows, out, stride, adds);
    else
        multiply<8>(weight, block, from, rows, out, stride, adds);
}

void expand_output(const Matrix& weight, int64_t output, float* to) {
    const uint8_t* at = weight.block(output / BLOCK_OUTS);
    const int64_t lane = output % BLOCK_OUTS, codes = weight.group_bytes() - 64;
    for (int64_t group = 0; group < weight.groups(); ++group, at += codes + 64, to += GROUP) {
        const auto* scales = reinterpret_cast<const uint16_t*>(at + codes);
        const float d = from_half(scales[lane]), m = from_half(scales[16 + lane]);
        for (int i = 0; i < GROUP; ++i) {
            const int quad = i / 4;
            const int code = weight.bits == 8 ? at[64 * quad + 4 * lane + i % 4]
                                              : at[64 * (quad / 2) + 4 * lane + i % 4] >> (4 * (quad % 2)) & 15;
            to[i] = std::fma(d, static_cast<float>(code), m);
        }
    }
}

namespace {

struct Product {
    const Matrix* weight;
    const float* x;
    Codes codes;
    int64_t rows;
    float* out;
};

void multiply_all(Region& region, void* what) {
    const Product& product = *static_cast<Product*>(what);
    const int64_t ins = product.weight->ins;
    region.each(product.rows, 1, [&](int64_t row) { quantize_row(product.x + row * ins, product.codes.from(row)); });
    region.each(product.weight->outs / BLOCK_OUTS, 4, [&](int64_t block) {
        multiply_block(*product.weight, block, product.codes, product.rows, product.out, product.weight->outs, false);
    });
}

}  // namespace
}  // namespace penstock

// out [rows, outs] = x [rows, ins] times the packed weight; q, scale and shift are room for the codes of x.
EXPORT void penstock_quant_linear(const penstock::Matrix* weight, const float* x, int64_t rows, int8_t* q, float* scale,
                                  float* shift, float* out, int32_t threads) {
    penstock::Product product{weight, x, {q, scale, shift, weight->ins}, rows, out};
    penstock::run_region(threads, 2, penstock::multiply_all, &product);
}

EXPORT void penstock_expand_output(const penstock::Matrix* weight, int64_t output, float* to) {
    penstock::expand_output(*weight, output, to);
}
