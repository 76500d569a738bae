// Products of bfloat16 pairs: a block of keys and values is turned once for all queries of a tile, queries and weights
// are rounded to bfloat16 as the cache's own keys and values are. Scores are powers of two, so that a weight costs a
// short polynomial and an exponent.
#include "cpu.h"

#include <algorithm>

namespace penstock {

#if defined(__AVX512BF16__)

namespace {

constexpr float LOG2_E = 1.44269504088896341f, LN_2 = 0.693147180559945309f;
constexpr int64_t TILE_KEYS = 64, KEY_VECTORS = TILE_KEYS / LANES;
constexpr int64_t MAX_GROUP = 16, MAX_ROWS = TILE_QUERIES * MAX_GROUP;
constexpr int64_t ROWS = 6;  // computed together: 24 sums, 4 vectors of keys or values and what meets them fill the registers

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

// 2 to the power of v, within 8e-5, a share of what rounding to bfloat16 takes; 0 for minus infinity. A minimax
// polynomial for the part behind the whole one.
inline Floats power_of_two_of(Floats v) {
    const Floats rest = sub(v, _mm512_roundscale_ps(v, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC));
    Floats series = fma(rest, all(0.07802452264f), all(0.2260671554f));
    series = fma(series, rest, all(0.6958335405f));
    series = fma(series, rest, all(0.9999252186f));
    return _mm512_scalef_ps(series, v);
}

// A block of keys and values as the products want them, what is beyond the last key 0, and the state of every row:
// a query and head.
struct Tile {
    alignas(64) uint16_t keys[MAX_HEAD_DIM * TILE_KEYS];    // [head_dim / 2, TILE_KEYS, 2]
    alignas(64) uint16_t values[MAX_HEAD_DIM * TILE_KEYS];  // [TILE_KEYS / 2, head_dim, 2]
    alignas(64) uint16_t q[MAX_ROWS * MAX_HEAD_DIM];
    alignas(64) uint16_t weights[MAX_ROWS * TILE_KEYS];
    alignas(64) float out[MAX_ROWS * MAX_HEAD_DIM];
    alignas(64) float total[MAX_ROWS * LANES];  // of the weights, lane by lane
    float most[MAX_ROWS];
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

// Two rows of values, element beside element.
inline void interleave(const uint16_t* one, const uint16_t* two, int64_t size, uint16_t* to) {
    alignas(64) static constexpr uint16_t LOW[32] = {0, 32, 1, 33, 2,  34, 3,  35, 4,  36, 5,  37, 6,  38, 7,  39,
                                                     8, 40, 9, 41, 10, 42, 11, 43, 12, 44, 13, 45, 14, 46, 15, 47};
    const __m512i low = _mm512_load_si512(LOW), high = _mm512_add_epi16(low, _mm512_set1_epi16(16));
    for (int64_t j = 0; j < size; j += 32) {
        const __m512i a = _mm512_loadu_si512(one + j), b = _mm512_loadu_si512(two + j);
        _mm512_storeu_si512(to + 2 * j, _mm512_permutex2var_epi16(a, low, b));
        _mm512_storeu_si512(to + 2 * j + 32, _mm512_permutex2var_epi16(a, high, b));
    }
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

// Call a quarter of a tile's keys and values into the caches: memory answers only so many calls at once.
void call_quarter(const Pool& pool, const Queries& queries, const Ahead& ahead, int64_t quarter) {
    const int64_t from = ahead.from + quarter * (TILE_KEYS / 4), to = std::min(from + TILE_KEYS / 4, ahead.to);
    if (from >= to) return;
    const int64_t values = pool.row(0, 0, 1, 0, 0);
    each_row(pool, ahead.blocks, queries.layer, ahead.head, from, to - from, [&](int64_t, const uint16_t* row) {
        // A function that only prefetches has no effect in the compiler's eyes, and it drops the call.
        for (int64_t j = 0; j < pool.head_dim; j += 32) {
            asm volatile("prefetcht1 %0" : : "m"(row[j]));
            asm volatile("prefetcht1 %0" : : "m"(row[values + j]));
        }
    });
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
    for (int64_t i = 0; i < TILE_KEYS; i += 2) interleave(v[i], v[i + 1], pool.head_dim, tile.values + i * pool.head_dim);
}

// Which keys of the tile a row sees, as bits: [first, last) of 64.
inline uint64_t bits_between(int64_t first, int64_t last) {
    const uint64_t below = last >= TILE_KEYS ? ~uint64_t{0} : (uint64_t{1} << last) - 1;
    return first >= last ? 0 : below & ~((uint64_t{1} << first) - 1);
}

// Scores of one row, the largest of them `highest`, into weights.
inline void soften(Tile& tile, int64_t row, int64_t head_dim, float highest, const Floats (&scores)[KEY_VECTORS]) {
    float* const total = tile.total + row * LANES;
    if (highest > tile.most[row]) {
        const Floats shrink = power_of_two_of(all(tile.most[row] - highest));  // 0 at the first key
        store(total, mul(load(total), shrink));
        for (int64_t j = 0; j < head_dim; j += LANES)
            store(tile.out + row * head_dim + j, mul(load(tile.out + row * head_dim + j), shrink));
        tile.most[row] = highest;
    }
    // A row that has not seen a key, because its window begins behind this tile, has no largest score to go by.
    const Floats most = all(tile.most[row] == LOWEST ? 0.0f : tile.most[row]);
    Floats sum_of = load(total);
    for (int i = 0; i < KEY_VECTORS; ++i) {
        const Floats weight = power_of_two_of(sub(scores[i], most));
        sum_of = add(sum_of, weight);
        store_brains(tile.weights + row * TILE_KEYS + i * LANES, weight);
    }
    store(total, sum_of);
}

// Scores of some rows against the tile's keys, and what follows from them: weights, sums, and the scale of what was
// there before. `seen` holds bits of each row, or is null where every row sees every key.
template <int Rows>
void score_rows(Tile& tile, int64_t row, int64_t head_dim, const uint64_t* seen) {
    __m512 score[Rows][KEY_VECTORS];
    for (int r = 0; r < Rows; ++r)
        for (int i = 0; i < KEY_VECTORS; ++i) score[r][i] = _mm512_setzero_ps();
    for (int64_t pair = 0; pair < head_dim / 2; ++pair) {
        __m512bh keys[KEY_VECTORS];
        for (int i = 0; i < KEY_VECTORS; ++i) keys[i] = pairs(tile.keys + (pair * TILE_KEYS + i * LANES) * 2);
        for (int r = 0; r < Rows; ++r) {
            const __m512bh q = same_pair(tile.q + (row + r) * head_dim + 2 * pair);
            for (int i = 0; i < KEY_VECTORS; ++i) score[r][i] = _mm512_dpbf16_ps(score[r][i], q, keys[i]);
        }
    }
#pragma GCC unroll 6
    for (int r = 0; r < Rows; ++r) {
        if (seen)
            for (int i = 0; i < KEY_VECTORS; ++i)
                score[r][i] = _mm512_mask_mov_ps(all(LOWEST), static_cast<__mmask16>(seen[row + r] >> (i * LANES)), score[r][i]);
        Floats highest = score[r][0];
        for (int i = 1; i < KEY_VECTORS; ++i) highest = larger(highest, score[r][i]);
        soften(tile, row + r, head_dim, largest(highest), score[r]);
    }
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
void weigh_rows(Tile& tile, int64_t row, int64_t head_dim) {
    int64_t from = 0;
    for (; from + 4 * LANES <= head_dim; from += 4 * LANES) weigh_rows<Rows, 4>(tile, row, head_dim, from);
    for (; from < head_dim; from += LANES) weigh_rows<Rows, 1>(tile, row, head_dim, from);
}

// One compiled for each number of rows; the operations on a row are the same in all of them.
using ScoreRows = void (*)(Tile&, int64_t, int64_t, const uint64_t*);
using WeighRows = void (*)(Tile&, int64_t, int64_t);
constexpr ScoreRows SCORE_ROWS[ROWS] = {score_rows<1>, score_rows<2>, score_rows<3>,
                                        score_rows<4>, score_rows<5>, score_rows<6>};
constexpr WeighRows WEIGH_ROWS[ROWS] = {weigh_rows<1>, weigh_rows<2>, weigh_rows<3>,
                                        weigh_rows<4>, weigh_rows<5>, weigh_rows<6>};

void start_rows(const Pool& pool, const Queries& queries, Tile& tile) {
    const int64_t dim = pool.head_dim, rows = queries.count * queries.group;
    for (int64_t row = 0; row < rows; ++row) {
        const float* q = queries.q + row / queries.group * queries.q_stride + row % queries.group * dim;
        for (int64_t j = 0; j < dim; j += LANES) {
            store_brains(tile.q + row * dim + j, mul(load(q + j), all(queries.scale * LOG2_E)));
            store(tile.out + row * dim + j, zeros());
        }
        tile.most[row] = LOWEST;
        store(tile.total + row * LANES, zeros());
    }
}

// Fills `seen` for the tile that begins with `key`; false where all rows see all of its keys.
bool find_seen(const Queries& queries, int64_t key, uint64_t* seen) {
    const int64_t last = queries.first_position + queries.count - 1;
    if (key + TILE_KEYS <= queries.first_position + 1 && first_key(queries, last) <= key) return false;
    for (int64_t token = 0; token < queries.count; ++token) {
        const int64_t position = position_of(queries, token);
        const int64_t first = std::clamp<int64_t>(first_key(queries, position) - key, 0, TILE_KEYS);
        const uint64_t bits = bits_between(first, std::clamp<int64_t>(position + 1 - key, 0, TILE_KEYS));
        for (int64_t head = 0; head < queries.group; ++head) *seen++ = bits;
    }
    return true;
}

// A tile's weights and weighted values for rows [from, to).
void attend_rows(Tile& tile, int64_t from, int64_t to, int64_t dim, const uint64_t* bits) {
    for (int64_t row = from; row < to; row += ROWS) SCORE_ROWS[std::min(ROWS, to - row) - 1](tile, row, dim, bits);
    for (int64_t row = from; row < to; row += ROWS) WEIGH_ROWS[std::min(ROWS, to - row) - 1](tile, row, dim);
}

// The key and value of the sequence's slot `at` into a column of the tile.
void place_key(const Pool& pool, const Queries& queries, int64_t at, int64_t column, Tile& tile) {
    const int64_t dim = pool.head_dim, values = pool.row(0, 0, 1, 0, 0);
    each_row(pool, queries.blocks, queries.layer, queries.head, at, 1, [&](int64_t, const uint16_t* row) {
        for (int64_t pair = 0; pair < dim / 2; ++pair)
            memcpy(tile.keys + (pair * TILE_KEYS + column) * 2, row + 2 * pair, 2 * sizeof(uint16_t));
        uint16_t* to = tile.values + column / 2 * 2 * dim + column % 2;
        for (int64_t j = 0; j < dim; ++j) to[2 * j] = row[values + j];
    });
}

// A tile that begins with `key` and holds new keys of a tree, in the order of their slots: tokens are computed together
// as long as each finds the keys of its path in their places, and then those that the next one needs are put there.
void attend_branches(const Pool& pool, const Queries& queries, int64_t key, Tile& tile, const uint64_t* bits) {
    const int64_t first = queries.first_position, group = queries.group;
    int64_t held[MAX_TREE], done = 0;
    for (int64_t place = 0; place < MAX_TREE; ++place) held[place] = place;
    for (int64_t token = 0; token < queries.count; ++token) {
        const Path path(queries, token);
        const int64_t from = std::max<int64_t>(0, key - first), to = std::min(path.length, key + TILE_KEYS - first);
        if (!std::equal(path.tokens + from, path.tokens + std::max(from, to), held + from)) {
            attend_rows(tile, done * group, token * group, pool.head_dim, bits);
            done = token;
        }
        for (int64_t place = from; place < to; ++place) {
            if (held[place] == path.tokens[place]) continue;
            held[place] = path.tokens[place];
            place_key(pool, queries, first + held[place], first + place - key, tile);
        }
    }
    attend_rows(tile, done * group, queries.count * group, pool.head_dim, bits);
}

}  // namespace

bool can_attend_brains(const Pool& pool, const Queries& queries) {
    return pool.kind == Kind::BRAIN && pool.head_dim % 32 == 0 && queries.group <= MAX_GROUP;
}

void attend_brains(const Pool& pool, const Queries& queries, int64_t from, int64_t to, Partial* partial) {
    static thread_local Tile tile;
    uint64_t seen[MAX_ROWS];
    const int64_t dim = pool.head_dim, rows = queries.count * queries.group;
    const int64_t start = std::max(from, first_key(queries, queries.first_position) / TILE_KEYS * TILE_KEYS);
    const int64_t last = std::min(to, queries.first_position + queries.count);
    start_rows(pool, queries, tile);
    for (int64_t key = start; key < last; key += TILE_KEYS) {
        const int64_t following = key + TILE_KEYS;
        const Ahead ahead = following < last ? Ahead{queries.blocks, queries.head, following, last} : queries.next;
        call_quarter(pool, queries, ahead, 0);
        load_keys(pool, queries, key, std::min(TILE_KEYS, last - key), tile);
        call_quarter(pool, queries, ahead, 1);
        const uint64_t* bits = find_seen(queries, key, seen) ? seen : nullptr;
        if (queries.tree && key + TILE_KEYS > queries.first_position) {
            attend_branches(pool, queries, key, tile, bits);
            continue;
        }
        for (int64_t row = 0; row < rows; row += ROWS) SCORE_ROWS[std::min(ROWS, rows - row) - 1](tile, row, dim, bits);
        call_quarter(pool, queries, ahead, 2);
        for (int64_t row = 0; row < rows; row += ROWS) WEIGH_ROWS[std::min(ROWS, rows - row) - 1](tile, row, dim);
        call_quarter(pool, queries, ahead, 3);
    }
    for (int64_t row = 0; row < rows; ++row) {
        partial[row].largest = tile.most[row] * LN_2;
        partial[row].sum = sum(load(tile.total + row * LANES));
        memcpy(partial[row].values, tile.out + row * dim, dim * sizeof(float));
    }
}

#else

bool can_attend_brains(const Pool&, const Queries&) { return false; }

void attend_brains(const Pool&, const Queries&, int64_t, int64_t, Partial*) {}

#endif

}  // namespace penstock
