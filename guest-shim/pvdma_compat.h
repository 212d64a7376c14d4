/* SPDX-License-Identifier: GPL-2.0 */
/*
 * Everything in which the kernels differ, and nothing else. PVDMA_HAVE_* come from
 * Kbuild, which compiled probe/<name>.c to find out.
 */
#ifndef PVDMA_COMPAT_H
#define PVDMA_COMPAT_H

#include <linux/dma-map-ops.h>

/* On x86, GART_IOMMU or XEN select it. Without, set_dma_ops() is empty. */
#ifndef PVDMA_HAVE_DEV_DMA_OPS
#error "pvdma: a kernel without CONFIG_DMA_OPS or CONFIG_ARCH_HAS_DMA_OPS cannot be served"
#endif

#if !defined(PVDMA_HAVE_OP_MAP_PAGE) && !defined(PVDMA_HAVE_OP_MAP_PHYS)
#error "pvdma: dma_map_ops has neither map_page nor map_phys: a kernel not known here"
#endif

/*
 * 6.18 has both members and would call map_phys first: then map_phys it is, as
 * long as the lower layer's ops are of the same kind (see pvdma_stack.c).
 */
#ifdef PVDMA_HAVE_OP_MAP_PHYS
#define PVDMA_MAP_PHYS		1
#else
#define PVDMA_MAP_PHYS		0
#endif

/* The member's name; alloc_pages itself became a macro. */
#ifdef PVDMA_HAVE_OP_ALLOC_PAGES_OP
#define pvdma_op_alloc_pages	alloc_pages_op
#elif defined(PVDMA_HAVE_OP_ALLOC_PAGES)
#define pvdma_op_alloc_pages	alloc_pages
#else
#error "pvdma: dma_map_ops has no alloc_pages or alloc_pages_op: a kernel not known here"
#endif

/* Does the DMA core go to an IOMMU without looking at the device's ops? */
static inline bool pvdma_ops_ignored(const struct device *dev)
{
#ifdef PVDMA_HAVE_DEV_DMA_IOMMU
	return dev->dma_iommu;
#else
	return false;
#endif
}

#endif /* PVDMA_COMPAT_H */
