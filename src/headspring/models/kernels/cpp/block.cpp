// Decoder blocks over the rows of an engine's step, one after the other in one parallel region:
//
//   norm → q, k, v → norm and rotation of heads → pages → attention → out, + x → norm → gate, up → silu · up → down, + x
//
// At a hundred million parameters the cost of a token is not its products but a thousand calls around them. Each step here is
// the very function that the single operator calls, with the same rounding in between, so that a fused block gives what its
// module gives op by op, bit for bit. Threads wait for each other between steps by spinning, for less than a microsecond.

#include "paged.h"
#include "product.h"
#include "rows.h"

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

// A thread's share of a matrix that comes next, to be brought near while the thread has nothing else to do.
class Ahead {
  public:
    Ahead(const Packed &w, int64_t rows, int thread, int threads)
        : at_(w.panel(w.panels() * thread / threads)), end_(w.panel(w.panels() * (thread + 1) / threads)) {
        if (rows > FEW) at_ = end_;  // many rows are bound by arithmetic, and shared out in other ways
        end_ = std::min(end_, at_ + (1 << 19));
    }
    void some() {
        for (const uint8_t *stop = std::min(end_, at_ + 512); at_ < stop; at_ += 64)
            _mm_prefetch((const char *)at_, _MM_HINT_T1);
    }

  private:
    static constexpr int64_t FEW = 16;
    const uint8_t *at_, *end_;
};

// Everyone waits for everyone. Who has waited for long lets others have the processor: there may be fewer than threads.
class Barrier {
  public:
    void wait(int threads, Ahead ahead) {
        const int64_t turn = turn_.load(std::memory_order_relaxed);
        if (arrived_.fetch_add(1, std::memory_order_acq_rel) == threads - 1) {
            arrived_.store(0, std::memory_order_relaxed);
            turn_.store(turn + 1, std::memory_order_release);
            return;
        }
        for (int spins = 0; turn_.load(std::memory_order_acquire) == turn; spins++) {
            ahead.some();
            spins < 300 ? _mm_pause() : (void)sched_yield();
        }
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

// What the threads of a step share.
struct Shared {
    const Step &step;
    Memory &memory;
    Scratch scratch;
    bf16 *x;
    int64_t rows;
    Barrier barrier;
    std::atomic<int64_t> next{0};  // strip of attention
};

// One thread among those that compute a step.
class Worker {
  public:
    Worker(Shared &shared, int thread, int threads)
        : shared_(shared), thread_(thread), threads_(threads), rows_(shared.rows), start_(rows_ * thread / threads),
          end_(rows_ * (thread + 1) / threads) {}

    // `after` is the first matrix that is read after this block.
    void compute(const Block &block, const std::vector<Strip> &work, const Packed &after) {
        Memory &memory = shared_.memory;
        const int64_t width = block.width, hidden = block.down.inputs;
        const Rows mixed{memory.mixed.data(), block.qkv.outputs}, heads{memory.heads.data(), block.out.inputs};
        bf16 *x = shared_.x, *normed = memory.normed.data(), *both = memory.both.data(), *act = memory.act.data();

        normalised(x, block.mixer_gain, normed, width, block.mixer_epsilon);
        multiplied(block.qkv, normed, width, mixed.data, block.qkv_bias, nullptr, block.out);
        place(block, mixed);
        wait(block.out);
        attend(block, work, mixed, heads);
        wait(block.out);
        multiplied(block.out, heads.data, heads.ld, x, block.out_bias, x, block.both);
        normalised(x, block.feedforward_gain, normed, width, block.feedforward_epsilon);
        multiplied(block.both, normed, width, both, block.both_bias, nullptr, block.down);
        for (int64_t r = start_; r < end_; r++)
            silu_multiply_row(both + r * 2 * hidden, both + r * 2 * hidden + hidden, act + r * hidden, hidden);
        multiplied(block.down, act, hidden, x, block.down_bias, x, after);
    }

  private:
    Shared &shared_;
    const int thread_, threads_;
    const int64_t rows_, start_, end_;  // its own rows are those that `arrange` gives it
    Growing<float> room_;

    // `next` is the matrix that will be read after this.
    void wait(const Packed &next) { shared_.barrier.wait(threads_, Ahead(next, rows_, thread_, threads_)); }

    void normalised(const bf16 *x, const float *gain, bf16 *out, int64_t width, float epsilon) {
        for (int64_t r = start_; r < end_; r++) normalise(x + r * width, gain, out + r * width, width, epsilon);
    }

    // y = [add +] in Wᵀ [+ bias], of all rows and for all threads, each of which has made its own rows of `in`.
    void multiplied(const Packed &w, const bf16 *in, int64_t ld, bf16 *y, const bf16 *bias, const bf16 *add,
                    const Packed &next) {
        arrange(in, ld, rows_, w, shared_.scratch, thread_, threads_);
        wait(w);
        product(w, shared_.scratch, y, w.outputs, rows_, thread_, threads_, add, bias);
        wait(next);
    }

    // Queries and keys, where they lie, normalised and rotated; keys and values to their pages. A head after the other.
    void place(const Block &block, const Rows &mixed) {
        const int64_t C = block.pages.channels, heads = block.pages.heads, group = block.heads / heads;
        const int64_t *slots = shared_.memory.slots[block.group].data();
        const Rotation &rotation = shared_.step.rotations[block.rotation];
        if (thread_ == 0) shared_.next.store(0, std::memory_order_relaxed);
        for (int64_t task = heads * rows_ * thread_ / threads_; task < heads * rows_ * (thread_ + 1) / threads_; task++) {
            const int64_t head = task / rows_, row = task % rows_, key = block.heads + head;
            bf16 *at = mixed.data + row * mixed.ld;
            turn(block, rotation, at, row, head * group, group);
            turn(block, rotation, at, row, key, 1);
            write_page(block.pages, slots[row], head, at + key * C, at + (key + heads) * C);
        }
    }

    void turn(const Block &block, const Rotation &rotation, bf16 *at, int64_t row, int64_t first, int64_t count) {
        const int64_t C = block.pages.channels, angles = row * C / 2;
        const float *gains = block.head_gains ? block.head_gains + first * C : nullptr;
        if (rotation.cosines)
            place_row(at + first * C, gains, rotation.cosines + angles, rotation.sines + angles, at + first * C, count, C,
                      block.head_epsilon, room_.of(C));
        else if (gains)
            place_row(at + first * C, gains, nullptr, nullptr, at + first * C, count, C, block.head_epsilon, room_.of(C));
    }

    void attend(const Block &block, const std::vector<Strip> &work, const Rows &q, const Rows &out) {
        static thread_local PagedAttention attention;
        Tiles tiles;
        const Ragged &step = shared_.step.sequences[block.group];
        for (int64_t i; (i = shared_.next.fetch_add(1, std::memory_order_relaxed)) < int64_t(work.size());)
            attention.compute(work[i], step, block.pages, q, out, block.heads, block.window, block.scale);
    }
};

// The strips of each block; nothing where they are those of the block before.
std::vector<std::vector<Strip>> all_strips(const Block *blocks, int64_t count, const Ragged &step) {
    std::vector<std::vector<Strip>> found;
    for (int64_t i = 0; i < count; i++) {
        const bool alike = i && blocks[i].heads == blocks[i - 1].heads && blocks[i].pages.heads == blocks[i - 1].pages.heads;
        found.push_back(alike ? std::vector<Strip>() : strips(step, blocks[i].heads, blocks[i].pages.heads));
    }
    return found;
}

// Makes room for `rows` of the block that has the longest.
int64_t make_room(Memory &memory, const Block *blocks, int64_t count, int64_t rows) {
    int64_t inputs = 0;
    for (const Block *block = blocks; block < blocks + count; block++) {
        memory.normed.of(rows * block->width);
        memory.mixed.of(rows * block->qkv.outputs);
        memory.heads.of(rows * block->out.inputs);
        memory.both.of(rows * block->both.outputs);
        memory.act.of(rows * block->down.inputs);
        inputs = std::max({inputs, block->width, block->out.inputs, block->down.inputs});
    }
    return inputs;
}

}  // namespace

// x (rows, width) goes through `count` blocks, in place.
extern "C" void blocks(int threads, const Block *blocks, int64_t count, const Step *step, bf16 *x) {
    static thread_local Memory memory;
    const int64_t rows = step->sequences[0].rows();
    const std::vector<std::vector<Strip>> work = all_strips(blocks, count, step->sequences[0]);
    memory.slots.clear();
    for (int64_t group = 0; group < step->groups; group++) memory.slots.push_back(slots(step->sequences[group]));
    Shared shared{*step, memory, Scratch(rows, make_room(memory, blocks, count, rows)), x, rows};
    if (rows == 0) return;
    if (rows * blocks->both.outputs * blocks->width < 32768) threads = 1;  // not worth waking anyone
#pragma omp parallel num_threads(threads)
    {
        Worker worker(shared, omp_get_thread_num(), omp_get_num_threads());
        const std::vector<Strip> *strips = nullptr;
        for (int64_t i = 0; i < count; i++) {
            if (!work[i].empty()) strips = &work[i];
            worker.compute(blocks[i], *strips, blocks[std::min(i + 1, count - 1)].qkv);
        }
    }
}

#endif
