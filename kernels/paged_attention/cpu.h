// Paged attention on the CPU, one sequence's queries against one KV head.
#pragma once

#include <algorithm>
#include <limits>

#include "../native/simd.h"

namespace penstock {

enum class Kind : int32_t { FLOAT = 0, BRAIN = 1, HALF = 2 };

// [blocks, layers, 2 (K, V), block_size, kv_heads, head_dim]; offsets are in elements and need 64 bits.
struct Pool {
    void* data;
    int64_t layers, block_size, kv_heads, head_dim;
    Kind kind;

    int64_t row(int64_t block, int64_t layer, int64_t part, int64_t slot, int64_t head) const {
        return ((((block * layers + layer) * 2 + part) * block_size + slot) * kv_heads + head) * head_dim;
    }
};

// Keys [from, to) of one head of a sequence that are wanted soon; none when `to` is not above `from`.
struct Ahead {
    const int64_t* blocks;
    int64_t head, from, to;
};

// Queries of one sequence: rows `first` … of q and out, the heads of one KV head; key 0 is the sequence's first token.
struct Queries {
    const float* q;  // of the first query's first head
    float* out;
    int64_t q_stride, out_stride;  // from one token to the next
    int64_t count, group;          // tokens, heads that share the KV head
    int64_t first_position;
    const int64_t* blocks;  // the sequence's block table
    int64_t layer, head;    // of the pool
    int64_t window;         // keys that a token sees, itself included; 0 for all
    float scale;
    Ahead next;             // what the caller asks for afterwards
    const int64_t* tree;    // [count] or null for a chain: which of these tokens each one sees, as tree.py packs it
};

// New tokens of a sequence that may form a tree. They lie in consecutive slots, and a row takes the keys on its own path
// in the places that they would have in a chain: so it is computed as in a chain, bit for bit.
constexpr int64_t MAX_TREE = 16;

// The new tokens that one of them sees, itself last: token i of the path takes place first_position + i.
struct Path {
    int64_t length = 0;
    int64_t tokens[MAX_TREE];

    Path() = default;
    Path(const Queries& queries, int64_t token) {
        for (int64_t other = 0; other <= token; ++other)
            if (queries.tree[token] >> other & 1) tokens[length++] = other;
    }
};

// A context is cut into parts of so many keys, which threads may share. A query's result is that of its parts joined in
// order, whoever computed them, however many queries beside it: so it is the same bit for bit in a decode step, in a
// prompt and in another chunk of it.
constexpr int64_t PART_KEYS = 512;
constexpr int64_t TILE_QUERIES = 32;  // tokens of a prompt computed together against a block of keys
constexpr int64_t MAX_HEAD_DIM = 256;
constexpr float LOWEST = -std::numeric_limits<float>::infinity();  // the score of a key that is not seen

// Where a token stands, which is among how many keys it sees.
inline int64_t position_of(const Queries& queries, int64_t token) {
    if (!queries.tree) return queries.first_position + token;
    return queries.first_position + Path(queries, token).length - 1;
}

inline int64_t first_key(const Queries& queries, int64_t position) {
    return queries.window > 0 ? std::max<int64_t>(0, position - queries.window + 1) : 0;
}

// What a part of the keys contributes: the largest score, the sum of the weights, and the weighted sum of the values.
struct Partial {
    float largest, sum;
    float values[MAX_HEAD_DIM];
};

// Keys [from, to) of one part by products of bfloat16 pairs, where processor and pool have them.
bool can_attend_brains(const Pool& pool, const Queries& queries);
void attend_brains(const Pool& pool, const Queries& queries, int64_t from, int64_t to, Partial* partial);

// Keys [from, to) of one part, for at most TILE_QUERIES queries, into `partial` [count · group].
void attend_part(const Pool& pool, const Queries& queries, int64_t from, int64_t to, Partial* partial);

// The parts of one query and head together, into out [head_dim]. What the first one held is lost.
void join_parts(Partial* partial, int64_t parts, int64_t stride, int64_t head_dim, float* out);

// All keys of at most TILE_QUERIES queries, part after part.
void attend_tile(const Pool& pool, const Queries& queries);

// One token's K or V row into the pool, in its type.
void store_row(const Pool& pool, int64_t element, const float* values);

}  // namespace penstock
