// About the library: its version, its sources, and what bindings compare when they load it.

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
    VALUE(OFFRAMP_INT4),
    VALUE(OFFRAMP_INT64),
    VALUE(OFFRAMP_UINT32),
    VALUE(OFFRAMP_GROUP),
    VALUE(OFFRAMP_PANEL),
    VALUE(OFFRAMP_MOST_THREADS),
    VALUE(OFFRAMP_MOST_DRAFTS),
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
    SIZE(offramp_rows),
    PLACE(offramp_rows, session),
    PLACE(offramp_rows, first),
    PLACE(offramp_rows, count),
    SIZE(offramp_gates),
    PLACE(offramp_gates, count),
    PLACE(offramp_gates, gates),
    PLACE(offramp_gates, after),
    PLACE(offramp_gates, thresholds),
    PLACE(offramp_gates, seen),
    PLACE(offramp_gates, logits),
    SIZE(offramp_pass),
    PLACE(offramp_pass, drafts),
    PLACE(offramp_pass, stood),
    PLACE(offramp_pass, asked),
    SIZE(offramp_steps),
    PLACE(offramp_steps, ids),
    PLACE(offramp_steps, known),
    PLACE(offramp_steps, enough),
    PLACE(offramp_steps, most),
    PLACE(offramp_steps, ends),
    PLACE(offramp_steps, ends_count),
    PLACE(offramp_steps, penalty),
    PLACE(offramp_steps, sketch),
    PLACE(offramp_steps, drafter),
    PLACE(offramp_steps, gates),
    PLACE(offramp_steps, decided),
    PLACE(offramp_steps, run),
    PLACE(offramp_steps, passes_count),
    PLACE(offramp_steps, passes),
    PLACE(offramp_steps, confidences),
    PLACE(offramp_steps, h),
    PLACE(offramp_steps, deep),
    PLACE(offramp_steps, seconds),
};

int64_t offramp_constant(const char *name) {
    for (size_t i = 0; i < sizeof CONSTANTS / sizeof *CONSTANTS; i++)
        if (!strcmp(name, CONSTANTS[i].name)) return CONSTANTS[i].value;
    return -1;
}
