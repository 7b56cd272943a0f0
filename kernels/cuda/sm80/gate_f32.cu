// Logits to experts. One warp per token, scores in registers; a few hundred FLOPs per token.
//
// Invariant: the lower index wins every tie, masked groups are minus infinity (never zero: biased scores may be
// negative), the bias never enters the weights, and choices are listed in ascending expert order.
#include "../common/kernel.h"

constexpr int GATE_WARPS = 4;
constexpr int GATE_SCORES = 16; // per lane, so up to 512 experts
constexpr float MINUS_INFINITY = -__builtin_huge_valf();

struct Ranked {
    float value;
    int index;
};

// The larger value, the lower index among equals.
DEVICE Ranked better(Ranked a, Ranked b) { return b.value > a.value || (b.value == a.value && b.index < a.index) ? b : a; }
DEVICE Ranked warp_best(Ranked best) {
#pragma unroll
    for (int mask = 16; mask > 0; mask >>= 1)
        best = better(best, Ranked{shuffle_xor(best.value, mask), shuffle_xor(best.index, mask)});
    return best;
}

KERNEL(gate_f32, GateParams, GATE_WARPS * 32) {
    const int row = block_x() * GATE_WARPS + warp_index(), lane = lane_index();
    if (!within(row, p.rows)) return; // whole warps leave; there is no block barrier below
    float score[GATE_SCORES], ranked[GATE_SCORES];
    float top = MINUS_INFINITY;
#pragma unroll
    for (int i = 0; i < GATE_SCORES; i++) {
        const int expert = i * 32 + lane;
        score[i] = within(expert, p.experts) ? p.logits[(int64_t)row * p.experts + expert] : MINUS_INFINITY;
        top = max_or_nan(top, score[i]);
    }
    if (p.softmax) {
        top = warp_max(top);
        float sum = 0.f;
#pragma unroll
        for (int i = 0; i < GATE_SCORES; i++) {
            score[i] = exp_exact(add_rn(score[i], -top));
            sum = add_rn(sum, score[i]);
        }
        sum = warp_sum(sum);
#pragma unroll
        for (int i = 0; i < GATE_SCORES; i++) score[i] = div_rn(score[i], sum);
    } else {
#pragma unroll
        for (int i = 0; i < GATE_SCORES; i++) score[i] = div_rn(1.f, add_rn(1.f, exp_exact(-score[i])));
    }
#pragma unroll
    for (int i = 0; i < GATE_SCORES; i++) {
        const int expert = i * 32 + lane;
        const bool inside = within(expert, p.experts);
        ranked[i] = !inside ? MINUS_INFINITY : p.bias ? add_rn(score[i], p.bias[expert]) : score[i];
        if (ranked[i] != ranked[i]) ranked[i] = MINUS_INFINITY; // NaN ranks below everything
    }
    if (p.groups_per_token < p.groups) {
        const int size = p.experts / p.groups;
        // Lane g keeps the score of group g (the planner allows at most 32 groups).
        float mine = MINUS_INFINITY;
        for (int group = 0; group < p.groups; group++) {
            Ranked first = {MINUS_INFINITY, 1 << 30};
            float second = MINUS_INFINITY;
#pragma unroll
            for (int i = 0; i < GATE_SCORES; i++) {
                const int expert = i * 32 + lane;
                if (expert / size != group) continue; // those past the last expert belong to no group
                if (ranked[i] > first.value) {
                    second = first.value;
                    first = {ranked[i], expert};
                } else if (ranked[i] > second) {
                    second = ranked[i];
                }
            }
            const Ranked best = warp_best(first);
            float sum = best.value;
            if (p.group_top_two && size > 1) {
                // The lane that held the best offers its own second; every other lane its first.
                const float offer = first.index == best.index ? second : first.value;
                sum = add_rn(sum, warp_max(offer));
            }
            if (lane == group) mine = sum;
        }
        uint32_t kept = 0;
        for (int chosen = 0; chosen < p.groups_per_token; chosen++) {
            const bool open = !(kept >> lane & 1); // lanes past the last group offer minus infinity and lose ties
            kept |= 1u << warp_best(open ? Ranked{mine, lane} : Ranked{MINUS_INFINITY, 32}).index % 32;
        }
#pragma unroll
        for (int i = 0; i < GATE_SCORES; i++) {
            const int expert = i * 32 + lane;
            if (!(kept >> (expert / size & 31) & 1)) ranked[i] = MINUS_INFINITY; // past the end it already is
        }
    }
    // Lane c holds choice c.
    int expert_of_choice = 0x7fffffff;
    uint32_t taken = 0; // bit i: own score i is chosen
    for (int c = 0; c < p.top_k; c++) {
        Ranked best = {MINUS_INFINITY, 1 << 30};
#pragma unroll
        for (int i = 0; i < GATE_SCORES; i++)
            if (!(taken >> i & 1)) best = better(best, Ranked{ranked[i], i * 32 + lane}); // past the end loses every tie
        best = warp_best(best);
        if (best.index % 32 == lane) taken |= 1u << (best.index / 32);
        if (lane == c) expert_of_choice = best.index;
    }
    float weight = 0.f; // score of this lane's choice, from the lane that owns the expert
#pragma unroll
    for (int i = 0; i < GATE_SCORES; i++) {
        const float offered = shuffle(score[i], expert_of_choice & 31);
        if (expert_of_choice / 32 == i) weight = offered;
    }
    int place = 0;
    for (int c = 0; c < p.top_k; c++) place += shuffle(expert_of_choice, c) < expert_of_choice;
    // Summed in ascending expert order, as the CPU does.
    float total = 0.f;
    for (int want = 0; want < p.top_k; want++) {
        const uint32_t holder = vote(place == want);
        total = add_rn(total, shuffle(weight, popcount((holder & -holder) - 1)));
    }
    if (within(lane, p.top_k)) {
        const float share = p.normalise ? div_rn(weight, add_rn(total, 1e-20f)) : weight;
        p.chosen[(int64_t)row * p.top_k + place] = expert_of_choice;
        p.weights[(int64_t)row * p.top_k + place] = mul_rn(share, p.scale);
    }
}
