// About the library: its version, its sources, and the numbers that bindings compare when they load it.

#include <stddef.h>

#include "drafts.h"
#include "rows.h"

int64_t offramp_version(void) { return OFFRAMP_VERSION; }

const char *offramp_kernels(void) {
    return
#if MULTIPLIES_BFLOAT16
        "AVX-512 BF16"
#elif WIDE
        "AVX-512"
#elif defined(__AVX2__)
        "AVX2"
#elif defined(__ARM_NEON)
        "NEON"
#else
        "plain C"
#endif
#if VNNI
        " and VNNI"
#elif defined(__ARM_FEATURE_DOTPROD)
        " with dot products"
#endif
        ;
}

typedef struct {
    const char *name;
    int64_t value;
} Constant;

#define VALUE(name) {#name, name}
#define SIZE(type) {#type, sizeof(type)}
#define PLACE(type, field) {#type "." #field, offsetof(type, field)}

static const Constant CONSTANTS[] = {
    VALUE(OFFRAMP_OK),
    VALUE(OFFRAMP_INVALID),
    VALUE(OFFRAMP_NO_MEMORY),
    VALUE(OFFRAMP_VERSION),
    VALUE(OFFRAMP_FLOAT32),
    VALUE(OFFRAMP_BFLOAT16),
    VALUE(OFFRAMP_INT8),
    VALUE(OFFRAMP_FLOAT16),
    VALUE(OFFRAMP_Q4_0),
    VALUE(OFFRAMP_Q4_1),
    VALUE(OFFRAMP_Q5_0),
    VALUE(OFFRAMP_Q5_1),
    VALUE(OFFRAMP_Q8_0),
    VALUE(OFFRAMP_Q2_K),
    VALUE(OFFRAMP_Q3_K),
    VALUE(OFFRAMP_Q4_K),
    VALUE(OFFRAMP_Q5_K),
    VALUE(OFFRAMP_Q6_K),
    VALUE(OFFRAMP_IQ4_NL),
    VALUE(OFFRAMP_IQ4_XS),
    VALUE(OFFRAMP_STACKED),
    VALUE(OFFRAMP_INT64),
    VALUE(OFFRAMP_UINT32),
    VALUE(OFFRAMP_GROUP),
    VALUE(OFFRAMP_PANEL),
    VALUE(OFFRAMP_GATE),
    VALUE(OFFRAMP_MAX_PROB),
    VALUE(OFFRAMP_MARGIN),
    VALUE(OFFRAMP_ENTROPY),
    VALUE(OFFRAMP_MOST_THREADS),
    VALUE(OFFRAMP_MOST_DRAFTS),
    VALUE(OFFRAMP_DEPTHS),
    SIZE(offramp_error),
    PLACE(offramp_error, message),
    SIZE(offramp_weight),
    PLACE(offramp_weight, type),
    PLACE(offramp_weight, fine),
    PLACE(offramp_weight, rows),
    PLACE(offramp_weight, columns),
    PLACE(offramp_weight, values),
    PLACE(offramp_weight, scales),
    PLACE(offramp_weight, bias),
    PLACE(offramp_weight, pieces),
    SIZE(offramp_rows),
    PLACE(offramp_rows, session),
    PLACE(offramp_rows, first),
    PLACE(offramp_rows, count),
    SIZE(offramp_sampling),
    PLACE(offramp_sampling, temperature),
    PLACE(offramp_sampling, top_p),
    PLACE(offramp_sampling, min_p),
    PLACE(offramp_sampling, penalty),
    PLACE(offramp_sampling, top_k),
    PLACE(offramp_sampling, seed),
    VALUE(OFFRAMP_KEYS),
    VALUE(OFFRAMP_STATES),
    VALUE(OFFRAMP_BOTH),
    VALUE(OFFRAMP_SILU),
    VALUE(OFFRAMP_GELU),
    VALUE(OFFRAMP_SQUARED_RELU),
    VALUE(OFFRAMP_PROJECT),
    VALUE(OFFRAMP_COPY),
    VALUE(OFFRAMP_FREEZE),
    VALUE(OFFRAMP_DEFER),
    VALUE(OFFRAMP_VERIFY),
    VALUE(OFFRAMP_FROM_FULL),
    VALUE(OFFRAMP_FROM_EXIT),
    VALUE(OFFRAMP_FROM_TEXT),
    VALUE(OFFRAMP_FROM_TABLE),
    VALUE(OFFRAMP_NOT_FINITE),
    VALUE(OFFRAMP_NOTHING_FITS),
    SIZE(offramp_exit),
    PLACE(offramp_exit, after),
    PLACE(offramp_exit, tail),
    PLACE(offramp_exit, gate),
    PLACE(offramp_exit, readout),
    PLACE(offramp_exit, threshold),
    PLACE(offramp_exit, perhaps),
    PLACE(offramp_exit, key),
    PLACE(offramp_exit, asking),
    PLACE(offramp_exit, gate_flops),
    PLACE(offramp_exit, readout_flops),
    SIZE(offramp_block_costs),
    PLACE(offramp_block_costs, flops),
    PLACE(offramp_block_costs, seen_flops),
    PLACE(offramp_block_costs, key_flops),
    PLACE(offramp_block_costs, state_flops),
    SIZE(offramp_rules),
    PLACE(offramp_rules, exits),
    PLACE(offramp_rules, count),
    PLACE(offramp_rules, fill),
    PLACE(offramp_rules, confidence),
    PLACE(offramp_rules, key),
    PLACE(offramp_rules, middle),
    PLACE(offramp_rules, pending),
    PLACE(offramp_rules, alike),
    PLACE(offramp_rules, decay),
    PLACE(offramp_rules, sketch),
    PLACE(offramp_rules, exit_sketch),
    PLACE(offramp_rules, shortlist),
    PLACE(offramp_rules, guesses),
    PLACE(offramp_rules, costs),
    PLACE(offramp_rules, head_flops),
    PLACE(offramp_rules, exit_head_flops),
    PLACE(offramp_rules, row_costs),
    PLACE(offramp_rules, accepted),
    SIZE(offramp_decision),
    PLACE(offramp_decision, id),
    PLACE(offramp_decision, block),
    PLACE(offramp_decision, confidence),
    PLACE(offramp_decision, flops),
    PLACE(offramp_decision, blocks),
    PLACE(offramp_decision, passes),
    PLACE(offramp_decision, rejected),
    PLACE(offramp_decision, source),
    SIZE(offramp_request),
    PLACE(offramp_request, session),
    PLACE(offramp_request, ids),
    PLACE(offramp_request, known),
    PLACE(offramp_request, prompt),
    PLACE(offramp_request, reads),
    PLACE(offramp_request, most),
    PLACE(offramp_request, ends),
    PLACE(offramp_request, ends_count),
    PLACE(offramp_request, how),
    PLACE(offramp_request, allowed),
    PLACE(offramp_request, whole),
    PLACE(offramp_request, deep),
    PLACE(offramp_request, decisions),
    PLACE(offramp_request, run),
    PLACE(offramp_request, decided),
    PLACE(offramp_request, asked),
    PLACE(offramp_request, failed),
};

int64_t offramp_constant(const char *name) {
    for (size_t i = 0; i < sizeof CONSTANTS / sizeof *CONSTANTS; i++)
        if (!strcmp(name, CONSTANTS[i].name)) return CONSTANTS[i].value;
    return -1;
}
