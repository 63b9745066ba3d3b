// Decoder blocks over the rows of an engine's step, one after the other in one parallel region:
//
//   norm → q, k, v → norm and rotation of heads → pages → attention → out, + x → norm → gate, up → silu · up → down, + x
//
// At a hundred million parameters the cost of a token is not its products but a thousand calls around them. Each step here is
// the very function that the single operator calls, with the same rounding in between, so that a fused block gives what its
// module gives op by op, bit for bit. Threads wait for each other between steps by spinning, for less than a microsecond.

#include "native_paged.h"
#include "native_product.h"
#include "native_rows.h"

#include <atomic>
#include <omp.h>
#include <sched.h>

#ifdef HAS_PACKED_PRODUCTS

// Cosines and sines (rows, channels / 2), null where nothing is rotated.
struct Rotation {
    const float *cosines, *sines;
};

// What differs from step to step: the sequences with the pages of each group of layers that forget alike, and the rotations
// of each kind of position.
struct Step {
    const Ragged *sequences;
    const Rotation *rotations;
    int64_t groups;
};

// A pre-norm block of attention and SwiGLU. Matrices side by side: q, k, v; gate, up. Biases in bfloat16 and the gains of the
// heads (heads + key–value heads, channels) may be null; `window` 0 is none.
struct Block {
    Packed qkv, out, both, down;
    const bf16 *qkv_bias, *out_bias, *both_bias, *down_bias;
    const float *mixer_gain, *head_gains, *feedforward_gain;
    Pages pages;
    int64_t width, heads, window, group, rotation;
    float scale, mixer_epsilon, head_epsilon, feedforward_epsilon;
};

namespace {

// Everyone waits for everyone. Who has waited for long lets others have the processor: there may be fewer than threads.
class Barrier {
  public:
    void wait(int threads) {
        const int64_t turn = turn_.load(std::memory_order_relaxed);
        if (arrived_.fetch_add(1, std::memory_order_acq_rel) == threads - 1) {
            arrived_.store(0, std::memory_order_relaxed);
            turn_.store(turn + 1, std::memory_order_release);
            return;
        }
        for (int spins = 0; turn_.load(std::memory_order_acquire) == turn; spins++)
            if (spins < 300)
                _mm_pause();
            else
                sched_yield();
    }

  private:
    alignas(64) std::atomic<int> arrived_{0};
    alignas(64) std::atomic<int64_t> turn_{0};
};

// Where the rows of a step are written: page · PAGE + place in the page.
std::vector<int64_t> slots(const Ragged &step) {
    std::vector<int64_t> found;
    for (int64_t i = 0; i < step.sequences; i++)
        for (int64_t at = step.past[i]; at < step.past[i] + step.offsets[i + 1] - step.offsets[i]; at++)
            found.push_back(step.tables[i * step.pages + at / PAGE] * PAGE + at % PAGE);
    return found;
}

// What lies between the steps of a block, for all rows. It belongs to the thread that calls, and only grows.
struct Memory {
    Growing<bf16> normed, mixed, heads, both, act;
    std::vector<std::vector<int64_t>> slots;  // of each group
};

// One thread among those that compute.
class Worker {
  public:
    Worker(int thread, int threads, Barrier &barrier, std::atomic<int64_t> &next)
        : thread_(thread), threads_(threads), barrier_(barrier), next_(next) {}

    void compute(const Block &block, const Step &step, const std::vector<Strip> &work, Memory &memory, Scratch &scratch, bf16 *x,
                 int64_t rows) {
        const Ragged &ragged = step.sequences[block.group];
        const Rotation &rotation = step.rotations[block.rotation];
        const int64_t width = block.width, hidden = block.down.inputs;
        const Rows mixed{memory.mixed.buffer.data, block.qkv.outputs}, heads{memory.heads.buffer.data, block.out.inputs};
        bf16 *normed = memory.normed.buffer.data, *both = memory.both.buffer.data, *act = memory.act.buffer.data;
        const int64_t start = rows * thread_ / threads_, end = rows * (thread_ + 1) / threads_;  // the rows that `arrange` takes

        for (int64_t r = start; r < end; r++)
            normalise(x + r * width, block.mixer_gain, normed + r * width, width, block.mixer_epsilon);
        multiplied(block.qkv, normed, width, rows, scratch, mixed.data, block.qkv_bias, nullptr);
        place(block, memory.slots[block.group], rotation, mixed, rows);
        if (thread_ == 0) next_.store(0, std::memory_order_relaxed);
        wait();
        attend(block, ragged, work, mixed, heads);
        wait();
        multiplied(block.out, heads.data, heads.ld, rows, scratch, x, block.out_bias, x);
        for (int64_t r = start; r < end; r++)
            normalise(x + r * width, block.feedforward_gain, normed + r * width, width, block.feedforward_epsilon);
        multiplied(block.both, normed, width, rows, scratch, both, block.both_bias, nullptr);
        for (int64_t r = start; r < end; r++)
            silu_multiply_row(both + r * 2 * hidden, both + r * 2 * hidden + hidden, act + r * hidden, hidden);
        multiplied(block.down, act, hidden, rows, scratch, x, block.down_bias, x);
    }

  private:
    const int thread_, threads_;
    Barrier &barrier_;
    std::atomic<int64_t> &next_;  // strip of attention
    Growing<float> room_;

    void wait() { barrier_.wait(threads_); }

    // y = [add +] in Wᵀ [+ bias], for everyone. Each thread has made its own rows of `in`.
    void multiplied(const Packed &w, const bf16 *in, int64_t ld, int64_t rows, Scratch &scratch, bf16 *y, const bf16 *bias,
                    const bf16 *add) {
        arrange(in, ld, rows, w, scratch, thread_, threads_);
        wait();
        product(w, scratch, y, w.outputs, rows, thread_, threads_, add, bias);
        wait();
    }

    // Queries and keys, where they lie, normalised and rotated; keys and values to their pages. A head after the other.
    void place(const Block &block, const std::vector<int64_t> &slots, const Rotation &rotation, const Rows &mixed,
               int64_t rows) {
        const int64_t C = block.pages.channels, shared = block.pages.heads, group = block.heads / shared;
        float *room = room_.of(C);
        for (int64_t task = shared * rows * thread_ / threads_; task < shared * rows * (thread_ + 1) / threads_; task++) {
            const int64_t head = task / rows, row = task % rows, key = block.heads + head;
            bf16 *at = mixed.data + row * mixed.ld;
            const float *cosines = rotation.cosines ? rotation.cosines + row * C / 2 : nullptr;
            const float *sines = rotation.sines ? rotation.sines + row * C / 2 : nullptr;
            auto turned = [&](int64_t first, int64_t count) {
                const float *gains = block.head_gains ? block.head_gains + first * C : nullptr;
                if (gains || cosines)
                    place_row(at + first * C, gains, cosines, sines, at + first * C, count, C, block.head_epsilon, room);
            };
            turned(head * group, group);
            turned(key, 1);
            write_page(block.pages, slots[row], head, at + key * C, at + (key + shared) * C);
        }
    }

    void attend(const Block &block, const Ragged &ragged, const std::vector<Strip> &work, const Rows &q, const Rows &out) {
        static thread_local PagedAttention attention;
        Tiles tiles;
        for (int64_t i; (i = next_.fetch_add(1, std::memory_order_relaxed)) < int64_t(work.size());)
            attention.compute(work[i], ragged, block.pages, q, out, block.heads, block.window, block.scale);
    }
};

}  // namespace

// x (rows, width) goes through `count` blocks, in place.
extern "C" void blocks(int threads, const Block *blocks, int64_t count, const Step *step, bf16 *x) {
    static thread_local Memory own;
    Memory &memory = own;  // that of the calling thread, for all
    const int64_t rows = step->sequences[0].rows();
    int64_t inputs = 0;
    memory.slots.clear();
    for (int64_t group = 0; group < step->groups; group++) memory.slots.push_back(slots(step->sequences[group]));
    std::vector<std::vector<Strip>> work;
    for (const Block *block = blocks; block < blocks + count; block++) {
        memory.normed.of(rows * block->width);
        memory.mixed.of(rows * block->qkv.outputs);
        memory.heads.of(rows * block->out.inputs);
        memory.both.of(rows * block->both.outputs);
        memory.act.of(rows * block->down.inputs);
        inputs = std::max({inputs, block->width, block->out.inputs, block->down.inputs});
        const bool alike = block > blocks && block->heads == block[-1].heads && block->pages.heads == block[-1].pages.heads;
        work.push_back(alike ? std::vector<Strip>() : strips(step->sequences[0], block->heads, block->pages.heads));
    }
    Scratch scratch(rows, inputs);
    Barrier barrier;
    std::atomic<int64_t> next{0};
#pragma omp parallel num_threads(threads)
    {
        Worker worker(omp_get_thread_num(), omp_get_num_threads(), barrier, next);
        const std::vector<Strip> *strips = nullptr;
        for (int64_t i = 0; i < count; i++) {
            if (!work[i].empty()) strips = &work[i];
            worker.compute(blocks[i], *step, *strips, memory, scratch, x, rows);
        }
    }
}

#endif
