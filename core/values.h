// The values of a weight's rows, such as an embedding's.

#pragma once
#include "rows.h"

// Writes the values of one row of a weight (columns).
void values_of_row(const Weight *m, int64_t row, float *out);
