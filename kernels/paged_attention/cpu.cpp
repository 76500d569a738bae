// Scores and sums in float32 whatever the pool's type; where the processor multiplies bfloat16 pairs, a prompt's tile
// rounds queries and weights to it, as the cache's own keys and values are. Online softmax: Milakov and Gimelshein, 2018;
// tiles and parts: FlashAttention and Flash-Decoding (Dao, 2022 and 2023).
#include "cpu.h"

#include <algorithm>
#include <vector>

namespace penstock {
namespace {

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

// One query and head against keys [from, to) in batches of sixteen. `path`: where new keys lie; null for a chain.
template <class T, int Vectors>
void attend_one(const Pool& pool, const T* data, const Queries& queries, const float* q, int64_t from, int64_t to,
                const Path* path, Partial& partial) {
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
            int64_t at = key + std::min(i, count - 1);
            if (path && at >= queries.first_position)
                at = queries.first_position + path->tokens[at - queries.first_position];
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
        const int64_t position = position_of(queries, token);
        const Path path = queries.tree ? Path(queries, token) : Path();
        const int64_t start = std::max(from, first_key(queries, position)), stop = std::min(to, position + 1);
        for (int64_t head = 0; head < queries.group; ++head, ++partial) {
            partial->largest = LOWEST;
            partial->sum = 0;
            memset(partial->values, 0, pool.head_dim * sizeof(float));
            if (start < stop)
                attend_one<T, Vectors>(pool, data, queries, queries.q + token * queries.q_stride + head * pool.head_dim,
                                       start, stop, queries.tree ? &path : nullptr, *partial);
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

void attend_part(const Pool& pool, const Queries& queries, int64_t from, int64_t to, Partial* partial) {
    if (can_attend_brains(pool, queries)) return attend_brains(pool, queries, from, to, partial);
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
