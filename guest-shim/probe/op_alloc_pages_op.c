// SPDX-License-Identifier: GPL-2.0
/* From 6.10: alloc_pages_op. */
#include <linux/dma-map-ops.h>

const void *probe(const struct dma_map_ops *ops);
const void *probe(const struct dma_map_ops *ops)
{
	return ops->alloc_pages_op;
}
