// Scores and sums in float32 whatever the pool's type; where the processor multiplies bfloat16 pairs, a prompt's tile
// rounds queries and weights to it, as the cache's own keys and values are. Online softmax: Milakov and Gimelshein, 2018;
// tiles and parts: FlashAttention and Flash-Decoding (Dao, 2022 and 2023).
#include "cpu.h"

#include <algorithm>
#include <limits>
#include <vector>

namespace penstock {
namespace {

constexpr float LOWEST = -std::numeric_limits<float>::infinity();

template <class T>
struct Row;
template <>
struct Row<float> {
    static Floats at(const float* p) { return load(p); }
};
struct Brain {
    uint16_t bits;
};
struct Half {
    uint16_t bits;
};
template <>
struct Row<Brain> {
    static Floats at(const Brain* p) { return load_brain(&p->bits); }
};
template <>
struct Row<Half> {
    static Floats at(const Half* p) { return load_half(&p->bits); }
};

// Calls use(T*) for the pool's type.
template <class Use>
void with_type(const Pool& pool, Use use) {
    if (pool.kind == Kind::FLOAT)
        use(static_cast<float*>(pool.data));
    else if (pool.kind == Kind::BRAIN)
        use(static_cast<Brain*>(pool.data));
    else
        use(static_cast<Half*>(pool.data));
}

int64_t first_key(const Queries& queries, int64_t position) {
    return queries.window > 0 ? std::max<int64_t>(0, position - queries.window + 1) : 0;
}

constexpr int64_t BATCH_KEYS = 16;

// Sixteen sums across sixteen vectors, as one vector.
#if defined(__AVX512F__)
// In a tree of shuffles: four rounds that halve the number of vectors.
inline Floats sums_of_each(const Floats (&v)[BATCH_KEYS]) {
    Floats eight[8], four[4], two[2];
    for (int i = 0; i < 8; ++i) {  // lanes of v[2i] and v[2i+1] interleaved
        const Floats low = _mm512_unpacklo_ps(v[2 * i], v[2 * i + 1]), high = _mm512_unpackhi_ps(v[2 * i], v[2 * i + 1]);
        eight[i] = add(low, high);
    }
    for (int i = 0; i < 4; ++i) {
        const __m512d a = _mm512_castps_pd(eight[2 * i]), b = _mm512_castps_pd(eight[2 * i + 1]);
        four[i] = add(_mm512_castpd_ps(_mm512_unpacklo_pd(a, b)), _mm512_castpd_ps(_mm512_unpackhi_pd(a, b)));
    }
    for (int i = 0; i < 2; ++i) {  // each 128-bit lane holds four partial sums; add lanes pairwise
        const Floats low = _mm512_shuffle_f32x4(four[2 * i], four[2 * i + 1], 0x88),
                     high = _mm512_shuffle_f32x4(four[2 * i], four[2 * i + 1], 0xDD);
        two[i] = add(low, high);
    }
    const Floats low = _mm512_shuffle_f32x4(two[0], two[1], 0x88), high = _mm512_shuffle_f32x4(two[0], two[1], 0xDD);
    return add(low, high);
}
#else
inline Floats sums_of_each(const Floats (&v)[BATCH_KEYS]) {
    alignas(64) float lanes[BATCH_KEYS];
    for (int i = 0; i < BATCH_KEYS; ++i) lanes[i] = sum(v[i]);
    return load(lanes);
}
#endif

// One query and head against keys [from, to) in batches of sixteen.
template <class T, int Vectors>
void attend_one(const Pool& pool, const T* data, const Queries& queries, const float* q, int64_t from, int64_t to,
                Partial& partial) {
    Floats query[Vectors], values[Vectors];
    for (int i = 0; i < Vectors; ++i) {
        query[i] = mul(load(q + LANES * i), all(queries.scale));
        values[i] = zeros();
    }
    float most = LOWEST, total = 0;
    alignas(64) float weights[BATCH_KEYS];
    const T* rows[BATCH_KEYS];
    const int64_t to_values = pool.row(0, 0, 1, 0, 0);
    for (int64_t key = from; key < to; key += BATCH_KEYS) {
        const int64_t count = std::min(BATCH_KEYS, to - key);
        Floats products[BATCH_KEYS];
        for (int64_t i = 0; i < BATCH_KEYS; ++i) {
            const int64_t at = key + std::min(i, count - 1);
            rows[i] = data + pool.row(queries.blocks[at / pool.block_size], queries.layer, 0, at % pool.block_size,
                                      queries.head);
            Floats product = mul(query[0], Row<T>::at(rows[i]));
            for (int j = 1; j < Vectors; ++j) product = fma(query[j], Row<T>::at(rows[i] + LANES * j), product);
            products[i] = product;
        }
        store(weights, sums_of_each(products));
        for (int64_t i = count; i < BATCH_KEYS; ++i) weights[i] = LOWEST;
        const float highest = std::max(most, largest(load(weights)));
        const Floats weight = exponential(sub(load(weights), all(highest)));
        store(weights, weight);
        for (int64_t i = count; i < BATCH_KEYS; ++i) weights[i] = 0;
        if (highest > most) {
            const float shrink = most == LOWEST ? 0.0f : std::exp(most - highest);
            total *= shrink;
            for (int j = 0; j < Vectors; ++j) values[j] = mul(values[j], all(shrink));
            most = highest;
        }
        total += sum(load(weights));
        for (int64_t i = 0; i < count; ++i)
            for (int j = 0; j < Vectors; ++j)
                values[j] = fma(all(weights[i]), Row<T>::at(rows[i] + to_values + LANES * j), values[j]);
    }
    partial.largest = most;
    partial.sum = total;
    for (int j = 0; j < Vectors; ++j) store(partial.values + LANES * j, values[j]);
}

template <class T, int Vectors>
void attend_each(const Pool& pool, const T* data, const Queries& queries, int64_t from, int64_t to, Partial* partial) {
    for (int64_t token = 0; token < queries.count; ++token) {
        const int64_t position = queries.first_position + token;
        const int64_t start = std::max(from, first_key(queries, position)), stop = std::min(to, position + 1);
        for (int64_t head = 0; head < queries.group; ++head, ++partial) {
            partial->largest = LOWEST;
            partial->sum = 0;
            memset(partial->values, 0, pool.head_dim * sizeof(float));
            if (start < stop)
                attend_one<T, Vectors>(pool, data, queries, queries.q + token * queries.q_stride + head * pool.head_dim,
                                       start, stop, *partial);
        }
    }
}

template <class T>
void attend_each(const Pool& pool, const T* data, const Queries& queries, int64_t from, int64_t to, Partial* partial) {
    switch (pool.head_dim / LANES) {
        case 1: return attend_each<T, 1>(pool, data, queries, from, to, partial);
        case 2: return attend_each<T, 2>(pool, data, queries, from, to, partial);
        case 4: return attend_each<T, 4>(pool, data, queries, from, to, partial);
        case 5: return attend_each<T, 5>(pool, data, queries, from, to, partial);
        case 6: return attend_each<T, 6>(pool, data, queries, from, to, partial);
        case 8: return attend_each<T, 8>(pool, data, queries, from, to, partial);
        default: return attend_each<T, 16>(pool, data, queries, from, to, partial);
    }
}

}  // namespace

#if defined(__AVX512BF16__)

namespace {

constexpr int64_t TILE_KEYS = 64, KEY_VECTORS = TILE_KEYS / LANES;
constexpr int64_t MAX_GROUP = 16, MAX_ROWS = TILE_QUERIES * MAX_GROUP;

inline __m512bh pairs(const uint16_t* at) {
    const __m512i bits = _mm512_loadu_si512(at);
    __m512bh found;
    memcpy(&found, &bits, sizeof found);
    return found;
}

inline __m512bh same_pair(const uint16_t* at) {
    int32_t two;
    memcpy(&two, at, sizeof two);
    const __m512i bits = _mm512_set1_epi32(two);
    __m512bh found;
    memcpy(&found, &bits, sizeof found);
    return found;
}

inline void store_brains(uint16_t* at, Floats v) {
    const __m256bh bits = _mm512_cvtneps_pbh(v);
    memcpy(at, &bits, sizeof bits);
}

// A block of keys and values as the products want them:
// keys [head_dim / 2, TILE_KEYS, 2], values [TILE_KEYS / 2, head_dim, 2], bfloat16; what is beyond `count` is 0.
struct Tile {
    alignas(64) uint16_t keys[MAX_HEAD_DIM * TILE_KEYS];
    alignas(64) uint16_t values[MAX_HEAD_DIM * TILE_KEYS];
    alignas(64) uint16_t q[MAX_ROWS * MAX_HEAD_DIM];
    alignas(64) float scores[MAX_ROWS * TILE_KEYS];
    alignas(64) uint16_t weights[MAX_ROWS * TILE_KEYS];
    alignas(64) float out[MAX_ROWS * MAX_HEAD_DIM];
    float most[MAX_ROWS], total[MAX_ROWS];
};

// Sixteen keys of sixteen pairs each, turned: vector j of the result holds pair j of all keys.
inline void transpose(const uint16_t* const* rows, int64_t pair, uint16_t* to) {
    __m512i r[16], t[16];
    for (int i = 0; i < 16; ++i) r[i] = _mm512_loadu_si512(rows[i] + 2 * pair);
    for (int i = 0; i < 8; ++i) {
        t[2 * i] = _mm512_unpacklo_epi32(r[2 * i], r[2 * i + 1]);
        t[2 * i + 1] = _mm512_unpackhi_epi32(r[2 * i], r[2 * i + 1]);
    }
    for (int i = 0; i < 4; ++i) {
        r[4 * i] = _mm512_unpacklo_epi64(t[4 * i], t[4 * i + 2]);
        r[4 * i + 1] = _mm512_unpackhi_epi64(t[4 * i], t[4 * i + 2]);
        r[4 * i + 2] = _mm512_unpacklo_epi64(t[4 * i + 1], t[4 * i + 3]);
        r[4 * i + 3] = _mm512_unpackhi_epi64(t[4 * i + 1], t[4 * i + 3]);
    }
    for (int i = 0; i < 4; ++i) {
        t[i] = _mm512_shuffle_i32x4(r[i], r[i + 4], 0x88);
        t[i + 4] = _mm512_shuffle_i32x4(r[i], r[i + 4], 0xDD);
        t[i + 8] = _mm512_shuffle_i32x4(r[i + 8], r[i + 12], 0x88);
        t[i + 12] = _mm512_shuffle_i32x4(r[i + 8], r[i + 12], 0xDD);
    }
    for (int i = 0; i < 4; ++i) {
        r[i] = _mm512_shuffle_i32x4(t[i], t[i + 8], 0x88);
        r[i + 8] = _mm512_shuffle_i32x4(t[i], t[i + 8], 0xDD);
        r[i + 4] = _mm512_shuffle_i32x4(t[i + 4], t[i + 12], 0x88);
        r[i + 12] = _mm512_shuffle_i32x4(t[i + 4], t[i + 12], 0xDD);
    }
    for (int i = 0; i < 16; ++i) _mm512_storeu_si512(to + i * 2 * TILE_KEYS, r[i]);
}

// use(i, key row) for keys [from, from + count), without a division for each.
template <class Use>
void each_row(const Pool& pool, const int64_t* blocks, int64_t layer, int64_t head, int64_t from, int64_t count, Use use) {
    const auto* data = static_cast<const uint16_t*>(pool.data);
    const int64_t step = pool.kv_heads * pool.head_dim;
    int64_t block = from / pool.block_size, slot = from % pool.block_size;
    for (int64_t i = 0; i < count; ++block, slot = 0) {
        const uint16_t* row = data + pool.row(blocks[block], layer, 0, slot, head);
        for (; slot < pool.block_size && i < count; ++slot, ++i, row += step) use(i, row);
    }
}

// A head's share of all that lies in these blocks for one layer, line after line: its rows are apart from each other, but
// those of all heads together are a run of memory. What other heads ask for is what they need of this share.
void call_blocks(const Pool& pool, const int64_t* blocks, const Queries& queries, int64_t from, int64_t to) {
    const int64_t share = pool.row(0, 1, 0, 0, 0) * static_cast<int64_t>(sizeof(uint16_t)) / pool.kv_heads;
    for (int64_t block = from / pool.block_size; block * pool.block_size < to; ++block) {
        const auto* row = static_cast<const uint16_t*>(pool.data) + pool.row(blocks[block], queries.layer, 0, 0, 0);
        const char* at = reinterpret_cast<const char*>(row) + queries.head * share;
        // A function that only prefetches has no effect in the compiler's eyes, and it drops the call.
        for (int64_t i = 0; i < share; i += 64) asm volatile("prefetcht1 %0" : : "m"(at[i]));
    }
}

// A quarter of what the next sequence has at these keys: memory answers only so many calls at once.
void call_quarter(const Pool& pool, const Queries& queries, int64_t key, int64_t quarter) {
    const int64_t from = key + quarter * (TILE_KEYS / 4), to = std::min(from + TILE_KEYS / 4, queries.next_keys);
    if (from < to) call_blocks(pool, queries.next_blocks, queries, from, to);
}

void load_keys(const Pool& pool, const Queries& queries, int64_t key, int64_t count, Tile& tile) {
    static const uint16_t nothing[MAX_HEAD_DIM] = {};
    const uint16_t *k[TILE_KEYS], *v[TILE_KEYS];
    const int64_t values = pool.row(0, 0, 1, 0, 0);
    each_row(pool, queries.blocks, queries.layer, queries.head, key, count, [&](int64_t i, const uint16_t* row) {
        k[i] = row;
        v[i] = row + values;
    });
    for (int64_t i = count; i < TILE_KEYS; ++i) k[i] = v[i] = nothing;
    for (int64_t i = 0; i < TILE_KEYS; i += 16)
        for (int64_t pair = 0; pair < pool.head_dim / 2; pair += 16)
            transpose(k + i, pair, tile.keys + (pair * TILE_KEYS + i) * 2);
    for (int64_t i = 0; i < TILE_KEYS; i += 2)
        for (int64_t j = 0; j < pool.head_dim; j += 16) {
            const __m512i one = _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(v[i] + j)));
            const __m512i two = _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(v[i + 1] + j)));
            _mm512_storeu_si512(tile.values + (i / 2 * pool.head_dim + j) * 2, _mm512_or_si512(one, _mm512_slli_epi32(two, 16)));
        }
}

template <int Rows>
void score_rows(const Tile& tile, int64_t row, int64_t head_dim, float* scores) {
    __m512 total[Rows][KEY_VECTORS];
    for (int r = 0; r < Rows; ++r)
        for (int i = 0; i < KEY_VECTORS; ++i) total[r][i] = _mm512_setzero_ps();
    for (int64_t pair = 0; pair < head_dim / 2; ++pair) {
        __m512bh keys[KEY_VECTORS];
        for (int i = 0; i < KEY_VECTORS; ++i) keys[i] = pairs(tile.keys + (pair * TILE_KEYS + i * LANES) * 2);
        for (int r = 0; r < Rows; ++r) {
            const __m512bh q = same_pair(tile.q + (row + r) * head_dim + 2 * pair);
            for (int i = 0; i < KEY_VECTORS; ++i) total[r][i] = _mm512_dpbf16_ps(total[r][i], q, keys[i]);
        }
    }
    for (int r = 0; r < Rows; ++r)
        for (int i = 0; i < KEY_VECTORS; ++i) _mm512_storeu_ps(scores + r * TILE_KEYS + i * LANES, total[r][i]);
}

template <int Rows, int Vectors>
void weigh_rows(Tile& tile, int64_t row, int64_t head_dim, int64_t from) {
    __m512 total[Rows][Vectors];
    for (int r = 0; r < Rows; ++r)
        for (int i = 0; i < Vectors; ++i) total[r][i] = load(tile.out + (row + r) * head_dim + from + i * LANES);
    for (int64_t pair = 0; pair < TILE_KEYS / 2; ++pair) {
        __m512bh values[Vectors];
        for (int i = 0; i < Vectors; ++i) values[i] = pairs(tile.values + (pair * head_dim + from + i * LANES) * 2);
        for (int r = 0; r < Rows; ++r) {
            const __m512bh weight = same_pair(tile.weights + (row + r) * TILE_KEYS + 2 * pair);
            for (int i = 0; i < Vectors; ++i) total[r][i] = _mm512_dpbf16_ps(total[r][i], weight, values[i]);
        }
    }
    for (int r = 0; r < Rows; ++r)
        for (int i = 0; i < Vectors; ++i) store(tile.out + (row + r) * head_dim + from + i * LANES, total[r][i]);
}

template <int Rows>
void weigh(Tile& tile, int64_t row, int64_t head_dim) {
    int64_t from = 0;
    for (; from + 4 * LANES <= head_dim; from += 4 * LANES) weigh_rows<Rows, 4>(tile, row, head_dim, from);
    for (; from < head_dim; from += LANES) weigh_rows<Rows, 1>(tile, row, head_dim, from);
}

// Scores of one row into weights; keys outside [from, to) of this tile weigh nothing.
void soften(Tile& tile, int64_t row, int64_t from, int64_t to, int64_t head_dim) {
    float* scores = tile.scores + row * TILE_KEYS;
    for (int64_t i = 0; i < from; ++i) scores[i] = LOWEST;
    for (int64_t i = to; i < TILE_KEYS; ++i) scores[i] = LOWEST;
    Floats highest = load(scores);
    for (int i = 1; i < KEY_VECTORS; ++i) highest = larger(highest, load(scores + i * LANES));
    const float most = std::max(tile.most[row], largest(highest));
    if (most == LOWEST) {  // a window that begins behind this tile
        memset(tile.weights + row * TILE_KEYS, 0, TILE_KEYS * sizeof(uint16_t));
        return;
    }
    if (most > tile.most[row]) {
        const float shrink = tile.most[row] == LOWEST ? 0.0f : std::exp(tile.most[row] - most);
        tile.total[row] *= shrink;
        for (int64_t j = 0; j < head_dim; j += LANES)
            store(tile.out + row * head_dim + j, mul(load(tile.out + row * head_dim + j), all(shrink)));
        tile.most[row] = most;
    }
    Floats sum_of = zeros();
    for (int i = 0; i < KEY_VECTORS; ++i) {
        const __m512 score = load(scores + i * LANES);
        const __mmask16 seen = _mm512_cmp_ps_mask(score, _mm512_set1_ps(LOWEST), _CMP_GT_OQ);
        const __m512 weight = _mm512_maskz_mov_ps(seen, exponential(sub(score, all(most))));
        sum_of = add(sum_of, weight);
        store_brains(tile.weights + row * TILE_KEYS + i * LANES, weight);
    }
    tile.total[row] += sum(sum_of);
}

void start_rows(const Pool& pool, const Queries& queries, Tile& tile) {
    const int64_t dim = pool.head_dim, rows = queries.count * queries.group;
    for (int64_t row = 0; row < rows; ++row) {
        const float* q = queries.q + row / queries.group * queries.q_stride + row % queries.group * dim;
        for (int64_t j = 0; j < dim; j += LANES) {
            store_brains(tile.q + row * dim + j, mul(load(q + j), all(queries.scale)));
            store(tile.out + row * dim + j, zeros());
        }
        tile.most[row] = LOWEST;
        tile.total[row] = 0;
    }
}

void attend_brains(const Pool& pool, const Queries& queries, int64_t from, int64_t to, Partial* partial) {
    static thread_local Tile tile;
    const int64_t dim = pool.head_dim, rows = queries.count * queries.group;
    const int64_t seen = std::max(from, first_key(queries, queries.first_position) / TILE_KEYS * TILE_KEYS);
    const int64_t last = std::min(to, queries.first_position + queries.count);
    start_rows(pool, queries, tile);
    for (int64_t key = seen; key < last; key += TILE_KEYS) {
        call_quarter(pool, queries, key, 0);
        load_keys(pool, queries, key, std::min(TILE_KEYS, last - key), tile);
        call_quarter(pool, queries, key, 1);
        int64_t row = 0;
        for (; row + 4 <= rows; row += 4) score_rows<4>(tile, row, dim, tile.scores + row * TILE_KEYS);
        for (; row < rows; ++row) score_rows<1>(tile, row, dim, tile.scores + row * TILE_KEYS);
        call_quarter(pool, queries, key, 2);
        for (row = 0; row < rows; ++row) {
            const int64_t position = queries.first_position + row / queries.group;
            const int64_t first = std::clamp<int64_t>(first_key(queries, position) - key, 0, TILE_KEYS);
            soften(tile, row, first, std::clamp<int64_t>(position + 1 - key, 0, TILE_KEYS), dim);
        }
        call_quarter(pool, queries, key, 3);
        for (row = 0; row + 4 <= rows; row += 4) weigh<4>(tile, row, dim);
        for (; row < rows; ++row) weigh<1>(tile, row, dim);
    }
    for (int64_t row = 0; row < rows; ++row) {
        partial[row].largest = tile.most[row];
        partial[row].sum = tile.total[row];
        memcpy(partial[row].values, tile.out + row * dim, dim * sizeof(float));
    }
}

}  // namespace

#endif

void attend_part(const Pool& pool, const Queries& queries, int64_t from, int64_t to, Partial* partial) {
#if defined(__AVX512BF16__)
    if (pool.kind == Kind::BRAIN && pool.head_dim % 32 == 0 && queries.group <= MAX_GROUP)
        return attend_brains(pool, queries, from, to, partial);
#endif
    with_type(pool, [&](const auto* data) { attend_each(pool, data, queries, from, to, partial); });
}

void join_parts(Partial* partial, int64_t parts, int64_t stride, int64_t head_dim, float* out) {
    Partial& joined = *partial;
    for (int64_t i = 1; i < parts; ++i) {
        const Partial& part = partial[i * stride];
        if (part.sum == 0) continue;
        const float most = std::max(joined.largest, part.largest);
        const float mine = joined.sum == 0 ? 0.0f : std::exp(joined.largest - most), its = std::exp(part.largest - most);
        joined.largest = most;
        joined.sum = joined.sum * mine + part.sum * its;
        for (int64_t j = 0; j < head_dim; j += LANES)
            store(joined.values + j, fma(load(part.values + j), all(its), mul(load(joined.values + j), all(mine))));
    }
    for (int64_t j = 0; j < head_dim; j += LANES) store(out + j, div(load(joined.values + j), all(joined.sum)));
}

void attend_tile(const Pool& pool, const Queries& queries) {
    static thread_local std::vector<Partial> partial;
    const int64_t rows = queries.count * queries.group, last = queries.first_position + queries.count;
    const int64_t parts = (last + PART_KEYS - 1) / PART_KEYS;
    if (static_cast<int64_t>(partial.size()) < parts * rows) partial.resize(parts * rows);
    for (int64_t part = 0; part < parts; ++part)
        attend_part(pool, queries, part * PART_KEYS, std::min((part + 1) * PART_KEYS, last), partial.data() + part * rows);
    for (int64_t row = 0; row < rows; ++row)
        join_parts(partial.data() + row, parts, rows, pool.head_dim,
                   queries.out + row / queries.group * queries.out_stride + row % queries.group * pool.head_dim);
}

void store_row(const Pool& pool, int64_t element, const float* values) {
    if (pool.kind == Kind::FLOAT) {
        memcpy(static_cast<float*>(pool.data) + element, values, pool.head_dim * sizeof(float));
        return;
    }
    uint16_t* at = static_cast<uint16_t*>(pool.data) + element;
    for (int64_t i = 0; i < pool.head_dim; ++i)
        at[i] = pool.kind == Kind::BRAIN ? to_brain(values[i]) : to_half(values[i]);
}

}  // namespace penstock
