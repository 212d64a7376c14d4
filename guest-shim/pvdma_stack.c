// SPDX-License-Identifier: GPL-2.0
/*
 * The DMA operations of a device that already had some (a virtual IOMMU, Xen): the
 * lower layer maps first, and what it gives is what the guest's platform thinks
 * the device emits, so that is what the host is asked to translate. Undoing goes
 * the other way round. A driver hands back only the bus address, so the lower
 * layer's address of every page is remembered. Short rather than fast: no lists.
 * Address conventions: pvdma.h.
 */
#include <linux/gfp.h>
#include <linux/mm.h>
#include <linux/scatterlist.h>

#include "pvdma.h"

static void pvdma_forget_below(struct pvdma_device *p, u64 iova, u64 pages)
{
	unsigned long index = iova >> PAGE_SHIFT;
	unsigned long irq;

	xa_lock_irqsave(&p->below, irq);
	while (pages--)
		__xa_erase(&p->below, index++);
	xa_unlock_irqrestore(&p->below, irq);
}

/* Identity addresses tell what is below by themselves, and pages may be shared. */
static int pvdma_remember_below(struct pvdma_device *p, u64 iova, u64 below, u64 pages)
{
	unsigned long index = iova >> PAGE_SHIFT;
	unsigned long irq;
	u64 i;
	int err = 0;

	if (p->identity)
		return 0;
	xa_lock_irqsave(&p->below, irq);
	for (i = 0; i < pages && !err; i++)
		err = xa_err(__xa_store(&p->below, index + i,
					xa_mk_value((below >> PAGE_SHIFT) + i),
					GFP_ATOMIC));
	xa_unlock_irqrestore(&p->below, irq);
	if (err)
		pvdma_forget_below(p, iova, i);
	return err;
}

/* The lower layer's address for a bus address; false if there is no mapping. */
static bool pvdma_below(struct pvdma_device *p, u64 iova, dma_addr_t *below)
{
	void *page;

	if (p->identity) {
		*below = iova;
		return true;
	}
	page = xa_load(&p->below, iova >> PAGE_SHIFT);
	if (!page) {
		dev_warn_ratelimited(p->dev, "pvdma: bus address %#llx is not mapped\n",
				     iova);
		return false;
	}
	*below = ((u64)xa_to_value(page) << PAGE_SHIFT) | offset_in_page(iova);
	return true;
}

/* Maps [below, size) at the host. */
static int pvdma_push(struct pvdma_device *p, dma_addr_t below, size_t size,
		      u64 iova_max, u32 flags, unsigned long attrs,
		      dma_addr_t *address)
{
	u64 iova;
	u32 status;
	int err;

	status = pvdma_make(p, below, size, iova_max, flags, attrs, &iova);
	if (PVDMA_STATUS_CLASS(status))
		return pvdma_errno(status);
	err = pvdma_remember_below(p, iova, below, pvdma_pages(below, size));
	if (err) {
		pvdma_take(p, iova, size);
		return err;
	}
	*address = iova;
	return 0;
}

/*
 * Undoes pvdma_push(). False when the host still has the mapping, or never had:
 * then the lower layer's must stay too, and so must what is remembered of it.
 */
static bool pvdma_pop(struct pvdma_device *p, dma_addr_t iova, size_t size,
		      dma_addr_t *below)
{
	if (!pvdma_below(p, iova, below) ||
	    !pvdma_unreachable(pvdma_take(p, iova, size)))
		return false;
	if (!p->identity)
		pvdma_forget_below(p, iova, pvdma_pages(iova, size));
	return true;
}

#if PVDMA_MAP_PHYS
static dma_addr_t pvdma_stack_map_phys(struct device *dev, phys_addr_t phys,
				       size_t size, enum dma_data_direction dir,
				       unsigned long attrs)
#else
static dma_addr_t pvdma_stack_map_page(struct device *dev, struct page *page,
				       unsigned long offset, size_t size,
				       enum dma_data_direction dir,
				       unsigned long attrs)
#endif
{
	struct pvdma_device *p = pvdma_of(dev);
	dma_addr_t below, iova;

	if (unlikely(!p))
		return DMA_MAPPING_ERROR;
#if PVDMA_MAP_PHYS
	below = p->lower->map_phys(dev, phys, size, dir, attrs);
#else
	below = p->lower->map_page(dev, page, offset, size, dir, attrs);
#endif
	if (below == DMA_MAPPING_ERROR)
		return DMA_MAPPING_ERROR;
	if (!pvdma_push(p, below, size, pvdma_streaming_max(p, dev),
			pvdma_streaming_flags(p, dev, dir), attrs, &iova))
		return iova;
#if PVDMA_MAP_PHYS
	p->lower->unmap_phys(dev, below, size, dir, attrs);
#else
	p->lower->unmap_page(dev, below, size, dir, attrs);
#endif
	return DMA_MAPPING_ERROR;
}

static bool pvdma_stack_undo(struct device *dev, dma_addr_t iova, size_t size,
			     enum dma_data_direction dir, unsigned long attrs)
{
	struct pvdma_device *p = pvdma_of(dev);
	dma_addr_t below;

	if (unlikely(!p) || !pvdma_pop(p, iova, size, &below))
		return false;
#if PVDMA_MAP_PHYS
	p->lower->unmap_phys(dev, below, size, dir, attrs);
#else
	p->lower->unmap_page(dev, below, size, dir, attrs);
#endif
	return true;
}

static void pvdma_stack_unmap(struct device *dev, dma_addr_t iova, size_t size,
			      enum dma_data_direction dir, unsigned long attrs)
{
	pvdma_stack_undo(dev, iova, size, dir, attrs);
}

#if !PVDMA_MAP_PHYS
static dma_addr_t pvdma_stack_map_resource(struct device *dev, phys_addr_t phys,
					   size_t size, enum dma_data_direction dir,
					   unsigned long attrs)
{
	struct pvdma_device *p = pvdma_of(dev);
	dma_addr_t below, iova;

	if (unlikely(!p))
		return DMA_MAPPING_ERROR;
	below = p->lower->map_resource(dev, phys, size, dir, attrs);
	if (below == DMA_MAPPING_ERROR)
		return DMA_MAPPING_ERROR;
	if (!pvdma_push(p, below, size, pvdma_streaming_max(p, dev),
			pvdma_streaming_flags(p, dev, dir), attrs, &iova))
		return iova;
	if (p->lower->unmap_resource)
		p->lower->unmap_resource(dev, below, size, dir, attrs);
	return DMA_MAPPING_ERROR;
}

static void pvdma_stack_unmap_resource(struct device *dev, dma_addr_t iova,
				       size_t size, enum dma_data_direction dir,
				       unsigned long attrs)
{
	struct pvdma_device *p = pvdma_of(dev);
	dma_addr_t below;

	if (unlikely(!p) || !pvdma_pop(p, iova, size, &below))
		return;
	if (p->lower->unmap_resource)
		p->lower->unmap_resource(dev, below, size, dir, attrs);
}
#endif

/* Gives the first n segments back their lower addresses; false if one is stuck. */
static bool pvdma_pop_segments(struct pvdma_device *p, struct scatterlist *sgl, int n)
{
	struct scatterlist *sg;
	dma_addr_t below;
	bool all = true;
	int i;

	for_each_sg(sgl, sg, n, i) {
		if (pvdma_pop(p, sg_dma_address(sg), sg_dma_len(sg), &below))
			sg_dma_address(sg) = below;
		else
			all = false;
	}
	return all;
}

/*
 * How many segments a mapped scatterlist has: the call that unmaps it does not
 * say. They are as long together as the entries.
 */
static int pvdma_count_segments(struct scatterlist *sgl, int nents)
{
	struct scatterlist *sg;
	u64 bytes = 0;
	int i;

	for_each_sg(sgl, sg, nents, i)
		bytes += sg->length;
	for_each_sg(sgl, sg, nents, i) {
		if (!bytes || !sg_dma_len(sg))
			break;
		bytes -= min_t(u64, bytes, sg_dma_len(sg));
	}
	return i;
}

static int pvdma_stack_map_sg(struct device *dev, struct scatterlist *sgl, int nents,
			      enum dma_data_direction dir, unsigned long attrs)
{
	struct pvdma_device *p = pvdma_of(dev);
	struct scatterlist *sg;
	dma_addr_t iova;
	int n, i, err;

	if (unlikely(!p))
		return -EINVAL;
	n = p->lower->map_sg(dev, sgl, nents, dir, attrs);
	if (n <= 0)
		return n ?: -EIO;
	for_each_sg(sgl, sg, n, i) {
		err = pvdma_push(p, sg_dma_address(sg), sg_dma_len(sg),
				 pvdma_streaming_max(p, dev),
				 pvdma_streaming_flags(p, dev, dir), attrs, &iova);
		if (err) {
			if (pvdma_pop_segments(p, sgl, i))
				p->lower->unmap_sg(dev, sgl, nents, dir, attrs);
			return err;
		}
		sg_dma_address(sg) = iova;
	}
	return n;
}

static void pvdma_stack_unmap_sg(struct device *dev, struct scatterlist *sgl,
				 int nents, enum dma_data_direction dir,
				 unsigned long attrs)
{
	struct pvdma_device *p = pvdma_of(dev);

	if (likely(p) && pvdma_pop_segments(p, sgl, pvdma_count_segments(sgl, nents)))
		p->lower->unmap_sg(dev, sgl, nents, dir, attrs);
}

static void *pvdma_stack_alloc(struct device *dev, size_t size, dma_addr_t *iova,
			       gfp_t gfp, unsigned long attrs)
{
	struct pvdma_device *p = pvdma_of(dev);
	dma_addr_t below;
	void *vaddr;

	if (unlikely(!p))
		return NULL;
	vaddr = p->lower->alloc(dev, size, &below, gfp, attrs);
	if (!vaddr)
		return NULL;
	if (!pvdma_push(p, below, PAGE_ALIGN(size), pvdma_coherent_max(p, dev),
			pvdma_coherent_flags(p, DMA_BIDIRECTIONAL), attrs, iova))
		return vaddr;
	p->lower->free(dev, size, vaddr, below, attrs);
	return NULL;
}

static void pvdma_stack_free(struct device *dev, size_t size, void *vaddr,
			     dma_addr_t iova, unsigned long attrs)
{
	struct pvdma_device *p = pvdma_of(dev);
	dma_addr_t below;

	if (likely(p) && pvdma_pop(p, iova, PAGE_ALIGN(size), &below))
		p->lower->free(dev, size, vaddr, below, attrs);
}

/*
 * Not by the lower layer's alloc_pages: that is commonly made of the device's map
 * operation, which is ours, and every page would be translated twice.
 */
static struct page *pvdma_stack_alloc_pages(struct device *dev, size_t size,
					    dma_addr_t *iova,
					    enum dma_data_direction dir, gfp_t gfp)
{
	struct page *page = pvdma_get_pages(dev, size, gfp);

	if (!page)
		return NULL;
#if PVDMA_MAP_PHYS
	*iova = pvdma_stack_map_phys(dev, page_to_phys(page), size, dir, 0);
#else
	*iova = pvdma_stack_map_page(dev, page, 0, size, dir, 0);
#endif
	if (*iova != DMA_MAPPING_ERROR)
		return page;
	__free_pages(page, get_order(size));
	return NULL;
}

static void pvdma_stack_free_pages(struct device *dev, size_t size, struct page *page,
				   dma_addr_t iova, enum dma_data_direction dir)
{
	pvdma_put_pages(dev, page, size, iova,
			pvdma_stack_undo(dev, iova, size, dir, 0));
}

static int pvdma_stack_mmap(struct device *dev, struct vm_area_struct *vma,
			    void *vaddr, dma_addr_t iova, size_t size,
			    unsigned long attrs)
{
	struct pvdma_device *p = pvdma_of(dev);
	dma_addr_t below;

	if (unlikely(!p) || !pvdma_below(p, iova, &below))
		return -ENXIO;
	return p->lower->mmap(dev, vma, vaddr, below, size, attrs);
}

static int pvdma_stack_get_sgtable(struct device *dev, struct sg_table *sgt,
				   void *vaddr, dma_addr_t iova, size_t size,
				   unsigned long attrs)
{
	struct pvdma_device *p = pvdma_of(dev);
	dma_addr_t below;

	if (unlikely(!p) || !pvdma_below(p, iova, &below))
		return -ENXIO;
	return p->lower->get_sgtable(dev, sgt, vaddr, below, size, attrs);
}

static void pvdma_stack_sync_for_cpu(struct device *dev, dma_addr_t iova, size_t size,
				     enum dma_data_direction dir)
{
	struct pvdma_device *p = pvdma_of(dev);
	dma_addr_t below;

	if (likely(p) && pvdma_below(p, iova, &below))
		p->lower->sync_single_for_cpu(dev, below, size, dir);
}

static void pvdma_stack_sync_for_device(struct device *dev, dma_addr_t iova,
					size_t size, enum dma_data_direction dir)
{
	struct pvdma_device *p = pvdma_of(dev);
	dma_addr_t below;

	if (likely(p) && pvdma_below(p, iova, &below))
		p->lower->sync_single_for_device(dev, below, size, dir);
}

/* By segment: the addresses in the list are ours, not the lower layer's. */
static void pvdma_stack_sync_sg_for_cpu(struct device *dev, struct scatterlist *sgl,
					int nents, enum dma_data_direction dir)
{
	struct scatterlist *sg;
	int i;

	for_each_sg(sgl, sg, pvdma_count_segments(sgl, nents), i)
		pvdma_stack_sync_for_cpu(dev, sg_dma_address(sg), sg_dma_len(sg), dir);
}

static void pvdma_stack_sync_sg_for_device(struct device *dev,
					   struct scatterlist *sgl, int nents,
					   enum dma_data_direction dir)
{
	struct scatterlist *sg;
	int i;

	for_each_sg(sgl, sg, pvdma_count_segments(sgl, nents), i)
		pvdma_stack_sync_for_device(dev, sg_dma_address(sg), sg_dma_len(sg), dir);
}

/* Both layers have to accept the mask. */
static int pvdma_stack_dma_supported(struct device *dev, u64 mask)
{
	struct pvdma_device *p = pvdma_of(dev);

	if (likely(p) && p->lower->dma_supported && !p->lower->dma_supported(dev, mask))
		return 0;
	return pvdma_dma_supported(dev, mask);
}

static u64 pvdma_stack_get_required_mask(struct device *dev)
{
	struct pvdma_device *p = pvdma_of(dev);

	if (likely(p) && p->lower->get_required_mask)
		return p->lower->get_required_mask(dev);
	return pvdma_get_required_mask(dev);
}

static size_t pvdma_stack_max_mapping_size(struct device *dev)
{
	struct pvdma_device *p = pvdma_of(dev);
	size_t most = pvdma_max_mapping_size(dev);

	if (likely(p) && p->lower->max_mapping_size)
		most = min(most, p->lower->max_mapping_size(dev));
	return most;
}

/*
 * Fills in the ops for a device that has lower ones: what the lower layer cannot
 * do stays out. False when it lacks what nothing works without.
 */
bool pvdma_stack_ops(struct dma_map_ops *ops, const struct dma_map_ops *lower)
{
	bool sync = lower->sync_single_for_cpu && lower->sync_single_for_device;

	memset(ops, 0, sizeof(*ops));
#if PVDMA_MAP_PHYS
	if (!lower->map_phys || !lower->unmap_phys)
		return false;
	ops->map_phys = pvdma_stack_map_phys;
	ops->unmap_phys = pvdma_stack_unmap;
#else
	if (!lower->map_page || !lower->unmap_page)
		return false;
	ops->map_page = pvdma_stack_map_page;
	ops->unmap_page = pvdma_stack_unmap;
	if (lower->map_resource) {
		ops->map_resource = pvdma_stack_map_resource;
		ops->unmap_resource = pvdma_stack_unmap_resource;
	}
#endif
	if (!lower->map_sg || !lower->unmap_sg)
		return false;
	ops->map_sg = pvdma_stack_map_sg;
	ops->unmap_sg = pvdma_stack_unmap_sg;
	if (lower->alloc && lower->free) {
		ops->alloc = pvdma_stack_alloc;
		ops->free = pvdma_stack_free;
	}
	ops->pvdma_op_alloc_pages = pvdma_stack_alloc_pages;
	ops->free_pages = pvdma_stack_free_pages;
	if (lower->mmap)
		ops->mmap = pvdma_stack_mmap;
	if (lower->get_sgtable)
		ops->get_sgtable = pvdma_stack_get_sgtable;
	if (sync) {
		ops->sync_single_for_cpu = pvdma_stack_sync_for_cpu;
		ops->sync_single_for_device = pvdma_stack_sync_for_device;
		ops->sync_sg_for_cpu = pvdma_stack_sync_sg_for_cpu;
		ops->sync_sg_for_device = pvdma_stack_sync_sg_for_device;
	}
	ops->dma_supported = pvdma_stack_dma_supported;
	ops->get_required_mask = pvdma_stack_get_required_mask;
	ops->max_mapping_size = pvdma_stack_max_mapping_size;
	/* neither takes an address */
	ops->opt_mapping_size = lower->opt_mapping_size;
	ops->cache_sync = lower->cache_sync;
	return true;
}
