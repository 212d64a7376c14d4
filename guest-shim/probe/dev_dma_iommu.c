// SPDX-License-Identifier: GPL-2.0
/* From 6.12: set for a device behind an IOMMU, whose ops are then ignored. */
#include <linux/dma-map-ops.h>

bool probe(const struct device *dev);
bool probe(const struct device *dev)
{
	return dev->dma_iommu;
}
