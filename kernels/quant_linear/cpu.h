// Products of 8-bit rows with 4-bit or 8-bit weights, in groups of 32 inputs.
//
//   weight[out][in] = d · code + m        d and m for each output and group; code 0 … 15 or 0 … 255
//   row[in]         = scale · q           scale for each group; q -127 … 127
//   out             = Σ groups  d · scale · Σ code · q  +  m · (scale · Σ q)
//
// The inner sums are of whole numbers and exact; groups are added in order in float32. So a row's result does not depend
// on how many rows there are, on threads, or on the level of instructions.
//
// Packed: outputs in blocks of 16, each block group by group: codes, then 16 d and 16 m as float16.
//   4 bits   64 bytes hold inputs 8j … 8j+3 in the low halves and 8j+4 … 8j+7 in the high ones, four times
//   8 bits   64 bytes hold inputs 4j … 4j+3, eight times;         byte 4·output + input in both
#pragma once

#include "../native/simd.h"

namespace penstock {

constexpr int64_t GROUP = 32, BLOCK_OUTS = 16;

struct Matrix {
    int64_t outs, ins, bits;  // outs is a multiple of 16, ins of 32
    const uint8_t* data;
    const float* bias;  // [outs] or null

    int64_t groups() const { return ins / GROUP; }
    int64_t group_bytes() const { return BLOCK_OUTS * GROUP * bits / 8 + 64; }
    const uint8_t* block(int64_t index) const { return data + index * groups() * group_bytes(); }
};

// 8-bit rows: q [rows, ins], scale and shift [rows, ins / 32], shift = scale · Σ q.
struct Codes {
    int8_t* q;
    float *scale, *shift;
    int64_t ins;

    Codes from(int64_t row) const {
        return {q + row * ins, scale + row * (ins / GROUP), shift + row * (ins / GROUP), ins};
    }
};

// One row of `ins` floats into codes.
void quantize_row(const float* x, const Codes& to);

// out[row · stride + 16 · block …] = (or +=, with `adds`) 16 outputs of `rows` rows.
void multiply_block(const Matrix& weight, int64_t block, const Codes& from, int64_t rows, float* out, int64_t stride,
                    bool adds);

// The weights of one output, as floats.
void expand_output(const Matrix& weight, int64_t output, float* to);

}  // namespace penstock
