// The next token of each row: greedy, or drawn from what temperature, top-k, min-p and top-p leave, by a number that is a
// function of (seed, choice, position) alone.
//
// Tokens are never sorted. A set "the best n" is all tokens of at least some rank, and that rank is found by narrowing an
// interval to a quarter per pass over the row, until one token is left in it: about a dozen passes out of the second cache.
#include "sample.h"

struct SampleShared {
    BestShared best;
    double sums[3][SAMPLE_WARPS];
    int counts[SAMPLE_WARPS];
    uint64_t lowest[SAMPLE_WARPS];
};
static_assert(sizeof(SampleShared) == 704, "src/plan/sampling.rs asks for this much");

// Ten rounds of Philox4x32 (Salmon, Moraes, Dror, Shaw, SC 2011); uniform in [0, 1) with 53 bits.
DEVICE double uniform(uint64_t seed, uint32_t choice, uint64_t position) {
    uint32_t c0 = (uint32_t)position, c1 = (uint32_t)(position >> 32), c2 = choice, c3 = 0;
    uint32_t k0 = (uint32_t)seed, k1 = (uint32_t)(seed >> 32);
    for (int round = 0; round < 10; round++) {
        const uint64_t low = (uint64_t)0xD2511F53u * c0, high = (uint64_t)0xCD9E8D57u * c2;
        c0 = (uint32_t)(high >> 32) ^ c1 ^ k0;
        c1 = (uint32_t)high;
        c2 = (uint32_t)(low >> 32) ^ c3 ^ k1;
        c3 = (uint32_t)low;
        k0 += 0x9E3779B9u;
        k1 += 0xBB67AE85u;
    }
    return (double)(((uint64_t)c0 << 32 | c1) >> 11) / 9007199254740992.0;
}

struct Row {
    const float* logits;
    int vocabulary;
    float best;
    double scale, weight_min;
    uint64_t rank_min; // of the tokens that are left

    DEVICE double weight(float logit) const { return exp_double((double)add_rn(logit, -best) * scale); }
    DEVICE bool left(int i) const { return rank_of(logits[i], i) >= rank_min && weight(logits[i]) >= weight_min; }
};

// Sums over the block in a fixed order; `s.sums` is used once between barriers.
DEVICE void block_sums(double (&v)[3], int& count, SampleShared& s) {
#pragma unroll
    for (int j = 0; j < 3; j++) v[j] = warp_sum(v[j]);
    count = warp_sum(count);
    block_sync(); // everyone has read the last sums
    if (lane_index() == 0) {
#pragma unroll
        for (int j = 0; j < 3; j++) s.sums[j][warp_index()] = v[j];
        s.counts[warp_index()] = count;
    }
    block_sync(); // the new ones are there
    count = 0;
#pragma unroll
    for (int j = 0; j < 3; j++) v[j] = 0.0;
    for (int w = 0; w < SAMPLE_WARPS; w++) {
#pragma unroll
        for (int j = 0; j < 3; j++) v[j] = v[j] + s.sums[j][w];
        count += s.counts[w];
    }
}

// The sum of weights of the tokens that are left.
DEVICE double total_of(const Row& r, SampleShared& s) {
    double sums[3] = {};
    int count = 0;
    for (int i = thread_index(); within(i, r.vocabulary); i += SAMPLE_THREADS)
        if (r.left(i)) sums[0] = sums[0] + r.weight(r.logits[i]);
    block_sums(sums, count, s);
    return sums[0];
}

// A rank such that the tokens of at least that rank are the fewest best ones of those left that reach `goal`: in number,
// or in weight, or above it in weight.
enum Goal { REACH_NUMBER, REACH_WEIGHT, EXCEED_WEIGHT };
DEVICE uint64_t rank_at(const Row& r, Goal what, double goal, SampleShared& s) {
    uint64_t low = r.rank_min, high = rank_of(r.best, 0) + 1; // the goal is met at low, and not at high
    double above = 0.0;                                       // of the tokens from high on
    while (high - low > 1) {
        const uint64_t step = (high - low) / 4 > 0 ? (high - low) / 4 : 1;
        uint64_t pivot[3];
#pragma unroll
        for (int j = 0; j < 3; j++) pivot[j] = low + step * (j + 1) < high ? low + step * (j + 1) : high - 1;
        double sums[3] = {};
        int count = 0;
        for (int i = thread_index(); within(i, r.vocabulary); i += SAMPLE_THREADS) {
            const uint64_t rank = rank_of(r.logits[i], i);
            if (rank < low || rank >= high) continue;
            const double weight = r.weight(r.logits[i]);
            if (!(weight >= r.weight_min)) continue;
            count++;
#pragma unroll
            for (int j = 0; j < 3; j++)
                if (rank >= pivot[j]) sums[j] = sums[j] + (what == REACH_NUMBER ? 1.0 : weight);
        }
        block_sums(sums, count, s);
        if (count <= 1) break; // the only one left between is the last of the set
        const double base = above;
#pragma unroll
        for (int j = 0; j < 3; j++) {
            const double sum = base + sums[j];
            const bool met = what == EXCEED_WEIGHT ? sum > goal : sum >= goal;
            if (met && pivot[j] > low) low = pivot[j];
            if (!met && pivot[j] < high) {
                high = pivot[j];
                above = sum;
            }
        }
    }
    return low;
}

// The token of the lowest rank of those left.
DEVICE int last_of(const Row& r, SampleShared& s) {
    uint64_t lowest = ~0ull;
    for (int i = thread_index(); within(i, r.vocabulary); i += SAMPLE_THREADS) {
        const uint64_t rank = rank_of(r.logits[i], i);
        if (rank < lowest && r.left(i) && r.weight(r.logits[i]) > 0.0) lowest = rank;
    }
#pragma unroll
    for (int mask = 16; mask > 0; mask >>= 1) {
        const uint64_t other = shuffle_xor(lowest, mask);
        lowest = other < lowest ? other : lowest;
    }
    if (lane_index() == 0) s.lowest[warp_index()] = lowest;
    block_sync(); // every warp's lowest is there
    for (int w = 0; w < SAMPLE_WARPS; w++) lowest = s.lowest[w] < lowest ? s.lowest[w] : lowest;
    return token_of(lowest);
}

// The first token, by number, with which the sum of weights exceeds draw * total; the last one with a weight when rounding
// leaves none. A warp adds a range of its own in groups of 32, so that the range and the group are found by their sums.
DEVICE int pick_by_number(const Row& r, double draw, SampleShared& s) {
    const int lane = lane_index(), warp = warp_index();
    const int groups = ceil_div(r.vocabulary, 32), share = ceil_div(groups, SAMPLE_WARPS);
    double sum = 0.0;
    int last = -1;
    for (int g = warp * share; g < (warp + 1) * share && g < groups; g++) {
        const int i = 32 * g + lane;
        const double weight = within(i, r.vocabulary) ? r.weight(r.logits[i]) : 0.0;
        if (weight > 0.0) last = i;
        sum = sum + warp_sum(weight);
    }
#pragma unroll
    for (int mask = 16; mask > 0; mask >>= 1) {
        const int other = shuffle_xor(last, mask);
        last = other > last ? other : last;
    }
    if (lane == 0) {
        s.sums[0][warp] = sum;
        s.counts[warp] = last;
    }
    block_sync(); // every warp's sum is there
    double total = 0.0;
    for (int w = 0; w < SAMPLE_WARPS; w++) {
        total = total + s.sums[0][w];
        last = s.counts[w] > last ? s.counts[w] : last;
    }
    const double goal = draw * total;
    double before = 0.0;
    int owner = 0;
    while (owner < SAMPLE_WARPS && !(before + s.sums[0][owner] > goal)) {
        before = before + s.sums[0][owner];
        owner++;
    }
    if (owner == SAMPLE_WARPS) return last;
    // Every warp walks the owner's range, so that all know the token.
    int found = s.counts[owner];
    for (int g = owner * share; g < (owner + 1) * share && g < groups; g++) {
        const int i = 32 * g + lane;
        double weight = within(i, r.vocabulary) ? r.weight(r.logits[i]) : 0.0;
        const double group = warp_sum(weight);
        if (!(before + group > goal)) {
            before = before + group;
            continue;
        }
        const bool some = weight > 0.0;
#pragma unroll
        for (int up = 1; up < 32; up *= 2) {
            const double lower = shuffle(weight, lane >= up ? lane - up : lane);
            if (lane >= up) weight = weight + lower;
        }
        const uint32_t past = vote(some && before + weight > goal);
        if (past) {
            found = 32 * g + popcount((past & (0u - past)) - 1);
            break;
        }
        before = before + group;
    }
    return found;
}

KERNEL(sample_f32, SampleParams, SAMPLE_THREADS) {
    SampleShared& s = *reinterpret_cast<SampleShared*>(shared_memory());
    const int row = block_x();
    const float* numbers = p.numbers + row * SAMPLE_NUMBERS;
    const float* logits = p.logits + (int64_t)row * p.stride;
    const Best best = block_best(logits, p.vocabulary, s.best);
    int token = best.token;
    if (!within(token, p.vocabulary)) {
        token = -1; // nothing is allowed
    } else if (numbers[TEMPERATURE] >= GREEDY_TEMPERATURE) {
        const int64_t* key = p.draws + 3 * row;
        const double draw = uniform((uint64_t)key[0], (uint32_t)key[1], (uint64_t)key[2]);
        Row r = {logits, p.vocabulary, best.logit, 1.0 / (double)numbers[TEMPERATURE], (double)numbers[MIN_P], 0};
        const int top_k = p.top_k[row];
        if (top_k == 0 && numbers[MIN_P] == 0.f && numbers[TOP_P] >= 1.f) {
            token = pick_by_number(r, draw, s);
        } else {
            if (top_k > 0) r.rank_min = rank_at(r, REACH_NUMBER, (double)top_k, s);
            if (numbers[TOP_P] < 1.f) {
                const double goal = total_of(r, s) * (double)numbers[TOP_P];
                r.rank_min = rank_at(r, REACH_WEIGHT, goal, s);
            }
            const double goal = draw * total_of(r, s);
            r.rank_min = rank_at(r, EXCEED_WEIGHT, goal, s);
            token = last_of(r, s);
        }
    }
    if (thread_index() == 0) p.chosen[row] = token;
}
