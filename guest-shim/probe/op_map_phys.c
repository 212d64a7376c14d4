// SPDX-License-Identifier: GPL-2.0
/* From about 6.18: map_phys, from 6.19 alone. */
#include <linux/dma-map-ops.h>

const void *probe(const struct dma_map_ops *ops);
const void *probe(const struct dma_map_ops *ops)
{
	return ops->map_phys;
}
