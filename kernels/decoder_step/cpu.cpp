// A whole step of a decoder of the Llama family in one parallel region: what lies between two products is done where the
// data is, and threads meet some ten times a layer instead of waking up for each operator.
//
// The residual stream and everything between products is float32; products take 8-bit rows (quant_linear/cpu.h); keys
// and values are stored in the pool's type.
#include <algorithm>

#include "../native/arena.h"
#include "../native/export.h"
#include "../native/team.h"
#include "../paged_attention/cpu.h"
#include "../quant_linear/cpu.h"

namespace penstock {

// The twins of these structs are in op.py.
struct LayerWeights {
    const float* attention_norm;
    const float* mlp_norm;
    const float* qk_norm;  // [heads + kv_heads, head_dim] or null
    Matrix qkv, output, gate_up, down;
    int64_t window;   // 0: all keys
    int64_t rotates;  // rotary embedding
};

// Where the step of a draft head begins: with embedded tokens beside hidden states, each normed where there is a norm.
struct Entrance {
    const float *embedding_norm, *hidden_norm;
    Matrix fc;           // brings both to the width of the residual stream; without data the first qkv takes both
    int64_t keeps_norm;  // without fc: the residual stream is the normed hidden state, not the one that came
};

struct Network {
    int64_t hidden, inner, heads, kv_heads, head_dim, layers, vocab;
    float epsilon, scale;
    const float *cosines, *sines;  // [longest sequence, head_dim / 2]
    const LayerWeights* layer;
    const float* norm;  // or null, as each layer's attention_norm: what is normed else is taken as it is
    Matrix embedding, head;
    const Entrance* entrance;  // or null
};

struct Batch {
    int64_t tokens, sequences, samples, table_width;
    const int64_t *token_ids, *positions, *slots;   // [tokens]
    const int64_t *starts, *context_lens, *blocks;  // [sequences + 1], [sequences], [sequences, table_width]
    const int64_t* sampled;                         // [samples], rows in order
    const int64_t* tree;                            // [tokens], as tree.py packs it, or null where all are chains
    const float *states, *embedded;                 // [tokens, hidden]: for the entrance; tokens embedded already, or null
    float* logits;                                  // [samples, head.outs]
    int64_t* best;                                  // [samples], the first of the likeliest tokens
    float* highest;                                 // [samples], its logit; NaN when any logit is
    void (*on_layers)(int64_t);                     // or null: keys and values of so many layers are stored
    const int64_t* tapped;                          // [taps]: hidden states after so many layers, or -1: the last norm's
    float* features;                                // [samples, taps, hidden]
    int64_t taps, threads;
};

namespace {

constexpr int64_t FEW = 2;  // rows up to which every thread rounds all of them for itself, which spares a meeting
constexpr int64_t SHORT = 8;  // queries of a sequence up to which its keys are cut into parts

// What threads share of the attention: a part of the keys of a few queries, or a tile of many.
struct Piece {
    int64_t sequence, head, from, to, partial;  // partial: where its results go; -1 for a tile of tokens [from, to)
};

// The parts of `rows` queries and heads, to be joined.
struct Join {
    int64_t sequence, head, parts, rows, partial;
};

void normalize_row(const float* x, const float* weight, int64_t size, float epsilon, float* out) {
    Floats squares = zeros();
    for (int64_t i = 0; i < size; i += LANES) squares = fma(load(x + i), load(x + i), squares);
    const Floats factor = all(1.0f / std::sqrt(sum(squares) / static_cast<float>(size) + epsilon));
    for (int64_t i = 0; i < size; i += LANES) store(out + i, mul(mul(load(x + i), factor), load(weight + i)));
}

// SiLU(gate) · up.
void activate_row(const float* gate, const float* up, int64_t size, float* out) {
    for (int64_t i = 0; i < size; i += LANES) {
        const Floats g = load(gate + i);
        store(out + i, mul(div(g, add(all(1.0f), exponential(sub(zeros(), g)))), load(up + i)));
    }
}

void find_best(const float* logits, int64_t size, int64_t& best, float& highest) {
    Floats most = all(logits[0]);
    bool is_broken = false;
    int64_t i = 0;
    for (; i + LANES <= size; i += LANES) {
        most = larger(most, load(logits + i));
        is_broken |= has_nan(load(logits + i));
    }
    highest = largest(most);
    for (; i < size; ++i) {
        highest = highest < logits[i] ? logits[i] : highest;
        is_broken |= logits[i] != logits[i];
    }
    best = 0;
    while (best < size - 1 && logits[best] != highest) ++best;
    if (is_broken) highest = NAN;
}

// Dimension i turns with dimension i + size / 2.
void rotate_row(float* x, const float* cosine, const float* sine, int64_t size) {
    const int64_t half = size / 2;
    for (int64_t i = 0; i < half; ++i) {
        const float a = x[i], b = x[i + half];
        x[i] = a * cosine[i] - b * sine[i];
        x[i + half] = b * cosine[i] + a * sine[i];
    }
}

class Step {
   public:
    Step(const Network& net, const Pool& pool, const Batch& batch, Arena& arena)
        : net_(net), pool_(pool), batch_(batch) {
        // Few rows are rounded by every thread for itself, each in a place of its own.
        const int64_t rows = std::max(batch.tokens, FEW * batch.threads), widest =
            std::max({2 * net.hidden, net.inner, q_width()});
        x_ = arena.take<float>(rows * net.hidden);
        normal_ = arena.take<float>(rows * net.hidden);
        qkv_ = arena.take<float>(rows * stride());
        attended_ = arena.take<float>(rows * q_width());
        active_ = arena.take<float>(rows * net.inner);
        gate_up_ = arena.take<float>(rows * net.layer[0].gate_up.outs);
        codes_ = {arena.take<int8_t>(rows * widest), arena.take<float>(rows * widest / GROUP),
                  arena.take<float>(rows * widest / GROUP), 0};
        if (net.entrance) joined_ = arena.take<float>(rows * 2 * net.hidden);
        partials_ = arena.take<Partial>(plan_attention());
    }

    void run(Region& region) {
        const int64_t last = net_.layers - 1;
        if (net_.entrance)
            enter(region, *net_.entrance);
        else
            region.each(batch_.tokens, 8, [&](int64_t row) { embed(row, x_ + row * net_.hidden); });
        tap(region, 0, x_, batch_.sampled);
        for (int64_t index = 0; index < net_.layers; ++index) {
            const LayerWeights& layer = net_.layer[index];
            int64_t rows = batch_.tokens;
            if (index > 0 || !takes_both()) normalize(region, layer.attention_norm, rows);
            product(region, layer.qkv, rows, qkv_, false);
            store_keys(region, layer, index);
            if (region.index == 0 && batch_.on_layers) batch_.on_layers(index + 1);
            if (index == last && batch_.samples == 0) return;
            attend(region, layer, index);
            if (index == last) {
                keep_sampled(region);
                rows = batch_.samples;
            }
            quantize(region, attended_, q_width(), q_width(), rows);
            product(region, layer.output, rows, x_, true);
            normalize(region, layer.mlp_norm, rows);
            product(region, layer.gate_up, rows, gate_up_, false);
            activate(region, layer, rows);
            product(region, layer.down, rows, x_, true);
            tap(region, index + 1, x_, index == last ? nullptr : batch_.sampled);
        }
        normalize(region, net_.norm, batch_.samples);
        tap(region, -1, normal_, nullptr);
        product(region, net_.head, batch_.samples, batch_.logits, false);
        region.each(batch_.samples, 1, [&](int64_t row) {
            find_best(batch_.logits + row * net_.head.outs, net_.vocab, batch_.best[row], batch_.highest[row]);
        });
    }

    int64_t phases() const { return net_.layers * 12 + 8; }

   private:
    int64_t q_width() const { return net_.heads * net_.head_dim; }
    int64_t group() const { return net_.heads / net_.kv_heads; }
    int64_t stride() const { return net_.layer[0].qkv.outs; }

    // The codes of a row, and of a few rows those of this thread: `place` is the first row that is written.
    Codes codes(int64_t ins, int64_t place) const {
        return Codes{codes_.q, codes_.scale, codes_.shift, ins}.from(place);
    }

    static int64_t place(const Region& region, int64_t rows) { return rows <= FEW ? region.index * FEW : 0; }

    // round(row, place) for all rows: by all threads together, or few by every thread for itself.
    template <class Round>
    void each_row(Region& region, int64_t rows, Round round) {
        const int64_t own = place(region, rows);
        if (rows <= FEW) {
            for (int64_t row = 0; row < rows; ++row) round(row, own + row);
            return;
        }
        region.each(rows, 4, [&](int64_t row) { round(row, row); });
    }

    void embed(int64_t row, float* out) const {
        if (batch_.embedded)
            memcpy(out, batch_.embedded + row * net_.hidden, net_.hidden * sizeof(float));
        else
            expand_output(net_.embedding, batch_.token_ids[row], out);
    }

    // The first qkv multiplies what the entrance has rounded.
    bool takes_both() const { return net_.entrance && !net_.entrance->fc.data; }

    void enter(Region& region, const Entrance& entrance) {
        const int64_t hidden = net_.hidden, rows = batch_.tokens;
        region.each(rows, 1, [&](int64_t row) {
            float *left = joined_ + row * 2 * hidden, *right = left + hidden;
            embed(row, left);
            memcpy(right, batch_.states + row * hidden, hidden * sizeof(float));
            if (takes_both() && !entrance.keeps_norm) memcpy(x_ + row * hidden, right, hidden * sizeof(float));
            if (entrance.embedding_norm) normalize_row(left, entrance.embedding_norm, hidden, net_.epsilon, left);
            if (entrance.hidden_norm) normalize_row(right, entrance.hidden_norm, hidden, net_.epsilon, right);
            if (takes_both() && entrance.keeps_norm) memcpy(x_ + row * hidden, right, hidden * sizeof(float));
        });
        quantize(region, joined_, 2 * hidden, 2 * hidden, rows);
        if (!takes_both()) product(region, entrance.fc, rows, x_, false);
    }

    // Without `weight` rows are only rounded.
    void normalize(Region& region, const float* weight, int64_t rows) {
        if (!weight) return quantize(region, x_, net_.hidden, net_.hidden, rows);
        each_row(region, rows, [&](int64_t row, int64_t to) {
            float* normal = normal_ + to * net_.hidden;
            normalize_row(x_ + row * net_.hidden, weight, net_.hidden, net_.epsilon, normal);
            quantize_row(normal, codes(net_.hidden, to));
        });
    }

    void quantize(Region& region, const float* x, int64_t size, int64_t step, int64_t rows) {
        each_row(region, rows, [&](int64_t row, int64_t to) { quantize_row(x + row * step, codes(size, to)); });
    }

    void activate(Region& region, const LayerWeights& layer, int64_t rows) {
        each_row(region, rows, [&](int64_t row, int64_t to) {
            const float* gate = gate_up_ + row * layer.gate_up.outs;
            activate_row(gate, gate + net_.inner, net_.inner, active_ + to * net_.inner);
            quantize_row(active_ + to * net_.inner, codes(net_.inner, to));
        });
    }

    void product(Region& region, const Matrix& weight, int64_t rows, float* out, bool adds) {
        const int64_t blocks = weight.outs / BLOCK_OUTS;
        const Codes from = codes(weight.ins, place(region, rows));
        region.each(blocks, std::clamp<int64_t>(blocks / (region.size * 6), 1, 16), [&](int64_t block) {
            multiply_block(weight, block, from, rows, out, weight.outs, adds);
        });
    }

    void store_keys(Region& region, const LayerWeights& layer, int64_t index) {
        region.each(batch_.tokens, 4, [&](int64_t row) {
            float* x = qkv_ + row * stride();
            const int64_t turn = batch_.positions[row] * (net_.head_dim / 2);
            for (int64_t head = 0; head < net_.heads + net_.kv_heads; ++head) {
                float* at = x + head * net_.head_dim;
                if (layer.qk_norm)
                    normalize_row(at, layer.qk_norm + head * net_.head_dim, net_.head_dim, net_.epsilon, at);
                if (layer.rotates) rotate_row(at, net_.cosines + turn, net_.sines + turn, net_.head_dim);
            }
            const int64_t block = batch_.slots[row] / pool_.block_size, slot = batch_.slots[row] % pool_.block_size;
            for (int64_t part = 0; part < 2; ++part)
                for (int64_t head = 0; head < net_.kv_heads; ++head)
                    store_row(pool_, pool_.row(block, index, part, slot, head),
                              x + q_width() + (part * net_.kv_heads + head) * net_.head_dim);
        });
    }

    // Fills pieces_ and joins_; returns how many partial results there are.
    int64_t plan_attention() {
        int64_t partials = 0;
        for (int64_t seq = 0; seq < batch_.sequences; ++seq) {
            const int64_t count = batch_.starts[seq + 1] - batch_.starts[seq], context = batch_.context_lens[seq];
            if (count > SHORT) {
                for (int64_t from = 0; from < count; from += TILE_QUERIES)
                    for (int64_t head = 0; head < net_.kv_heads; ++head)
                        pieces_.push_back({seq, head, from, std::min(from + TILE_QUERIES, count), -1});
                continue;
            }
            const int64_t rows = count * group(), parts = (context + PART_KEYS - 1) / PART_KEYS;
            for (int64_t part = 0; part < parts; ++part)
                for (int64_t head = 0; head < net_.kv_heads; ++head)
                    pieces_.push_back({seq, head, part * PART_KEYS, std::min((part + 1) * PART_KEYS, context),
                                       partials + (head * parts + part) * rows});
            for (int64_t head = 0; head < net_.kv_heads; ++head, partials += parts * rows)
                joins_.push_back({seq, head, parts, rows, partials});
        }
        // A later tile sees more keys: it goes first, so that no thread is left alone with one at the end.
        std::reverse(pieces_.begin(), pieces_.end());
        return partials;
    }

    // Null for a chain, which is quicker to compute as one.
    const int64_t* tree_of(int64_t first, int64_t count) const {
        if (!batch_.tree || count > MAX_TREE) return nullptr;
        for (int64_t token = 0; token < count; ++token) {
            const int64_t all = (int64_t{2} << token) - 1;
            if ((batch_.tree[first + token] & all) != all) return batch_.tree + first;
        }
        return nullptr;
    }

    Queries queries(const LayerWeights& layer, int64_t index, int64_t seq, int64_t head) const {
        const int64_t first = batch_.starts[seq], count = batch_.starts[seq + 1] - first;
        const int64_t column = head * group() * net_.head_dim;
        return {qkv_ + first * stride() + column,
                attended_ + first * q_width() + column,
                stride(),
                q_width(),
                count,
                group(),
                batch_.context_lens[seq] - count,
                batch_.blocks + seq * batch_.table_width,
                index,
                head,
                layer.window,
                net_.scale,
                {},
                tree_of(first, count)};
    }

    void attend(Region& region, const LayerWeights& layer, int64_t index) {
        // One thread takes all heads of a sequence, which share cache lines' pages, where there is enough for all.
        const int64_t count = pieces_.size(), heads = net_.kv_heads;
        region.each(count, count >= 4 * region.size * heads ? heads : 1, [&](int64_t at) {
            const Piece& piece = pieces_[at];
            Queries asked = queries(layer, index, piece.sequence, piece.head);
            if (piece.partial >= 0) {
                asked.next = following(at);
                attend_part(pool_, asked, piece.from, piece.to, partials_ + piece.partial);
                return;
            }
            asked.q += piece.from * asked.q_stride;
            asked.out += piece.from * asked.out_stride;
            asked.first_position += piece.from;
            asked.count = piece.to - piece.from;
            attend_tile(pool_, asked);
        });
        region.each(joins_.size(), 4, [&](int64_t at) {
            const Join& join = joins_[at];
            const Queries asked = queries(layer, index, join.sequence, join.head);
            for (int64_t row = 0; row < join.rows; ++row)
                join_parts(partials_ + join.partial + row, join.parts, join.rows, net_.head_dim,
                           asked.out + row / group() * asked.out_stride + row % group() * net_.head_dim);
        });
    }

    // What the next piece will read, which most often falls to the same thread.
    Ahead following(size_t at) const {
        if (at + 1 >= pieces_.size() || pieces_[at + 1].partial < 0) return {};
        const Piece& next = pieces_[at + 1];
        return {batch_.blocks + next.sequence * batch_.table_width, next.head, next.from, next.to};
    }

    // What is asked for of the sampled rows, which stand in `x` at `rows` or, without, first. The first thread copies: it
    // comes here when `x` is complete, and all of them meet again before `x` changes.
    void tap(const Region& region, int64_t layer, const float* x, const int64_t* rows) {
        if (region.index != 0) return;
        for (int64_t at = 0; at < batch_.taps; ++at) {
            if (batch_.tapped[at] != layer) continue;
            for (int64_t i = 0; i < batch_.samples; ++i)
                memcpy(batch_.features + (i * batch_.taps + at) * net_.hidden,
                       x + (rows ? rows[i] : i) * net_.hidden, net_.hidden * sizeof(float));
        }
    }

    // Behind the last attention only the sampled rows matter; they are in order, so they move up.
    void keep_sampled(Region& region) {
        region.each(1, 1, [&](int64_t) {
            for (int64_t i = 0; i < batch_.samples; ++i) {
                const int64_t row = batch_.sampled[i];
                if (row == i) continue;
                memcpy(x_ + i * net_.hidden, x_ + row * net_.hidden, net_.hidden * sizeof(float));
                memcpy(attended_ + i * q_width(), attended_ + row * q_width(), q_width() * sizeof(float));
            }
        });
    }

    const Network& net_;
    const Pool& pool_;
    const Batch& batch_;
    std::vector<Piece> pieces_;
    std::vector<Join> joins_;
    float *x_, *normal_, *qkv_, *attended_, *gate_up_, *active_, *joined_ = nullptr;
    Codes codes_;
    Partial* partials_;
};

}  // namespace
}  // namespace penstock

EXPORT void penstock_decoder_step(const penstock::Network* net, const penstock::Pool* pool,
                                  const penstock::Batch* batch) {
    static thread_local penstock::Arena arena;
    arena.reset();
    penstock::Step step(*net, *pool, *batch, arena);
    penstock::run_region(
        static_cast<int>(batch->threads), step.phases(),
        [](penstock::Region& region, void* what) { static_cast<penstock::Step*>(what)->run(region); }, &step);
}
