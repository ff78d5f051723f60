#include "vectors.h"

#if MULTIPLIES_BFLOAT16
#define KIND PAIRED_BFLOAT16
#include "products_rows.h"

const Products products_paired_bfloat16 = PRODUCTS;
#endif
