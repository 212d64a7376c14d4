// SPDX-License-Identifier: GPL-2.0
/*
 * The DMA operations of a device that had none of its own: physical address in,
 * the host's bus address out. Called from any context, interrupts included, so
 * no operation sleeps, and the only lock is that of policy lazy's books, under which
 * nobody is called; a CPU's call page and counters are its own while its interrupts
 * are off. Address conventions: pvdma.h.
 */
#include <linux/gfp.h>
#include <linux/memremap.h>
#include <linux/mm.h>
#include <linux/module.h>
#include <linux/scatterlist.h>

#include "pvdma.h"

/* Memory ends here, inclusive: a tracking table has an entry for each page of it. */
static u64 pvdma_last_of_ram(const struct pvdma_device *p)
{
	return (p->table.pages << PAGE_SHIFT) - 1;
}

/* The last address that the device can emit and the host's IOMMU translates. */
u64 pvdma_streaming_max(const struct pvdma_device *p, struct device *dev)
{
	return min(min_not_zero(dma_get_mask(dev), dev->bus_dma_limit), p->iova_last);
}

u64 pvdma_coherent_max(const struct pvdma_device *p, struct device *dev)
{
	u64 mask = dev->coherent_dma_mask ?: DMA_BIT_MASK(32);

	return min(min_not_zero(mask, dev->bus_dma_limit), p->iova_last);
}

static u32 pvdma_direction(enum dma_data_direction dir)
{
	switch (dir) {
	case DMA_TO_DEVICE:
		return PVDMA_MAP_READ;
	case DMA_FROM_DEVICE:
		return PVDMA_MAP_WRITE;
	default:
		return PVDMA_MAP_READ | PVDMA_MAP_WRITE;
	}
}

/*
 * A range aligned to its length crosses no segment boundary that its pieces do
 * not cross by themselves. With identity addresses there is nothing to align.
 */
u32 pvdma_streaming_flags(const struct pvdma_device *p, struct device *dev,
			  enum dma_data_direction dir)
{
	u32 flags = pvdma_direction(dir);

	if (!p->identity && dma_get_seg_boundary(dev) < pvdma_streaming_max(p, dev))
		flags |= PVDMA_MAP_ALIGN;
	return flags;
}

/* dma_alloc_coherent() promises memory aligned to its size, rounded up. */
u32 pvdma_coherent_flags(const struct pvdma_device *p, enum dma_data_direction dir)
{
	return pvdma_direction(dir) | (p->identity ? 0 : PVDMA_MAP_ALIGN);
}

/*
 * What map_sg returns, which may be one of four. -ENOMEM is worth another try; the
 * block layer puts the request back into its queue (BLK_STS_RESOURCE). So nvme does
 * for -EINVAL and -EIO, on 6.1 and 6.12, and a request that can never be mapped
 * would come back for ever, its caller asleep. -EREMOTEIO is made for memory that no
 * retry makes reachable, and ends the request with an error (BLK_STS_TARGET): the
 * right thing for a device that is gone and for a request that the host refuses.
 */
int pvdma_errno(u32 status)
{
	switch (PVDMA_STATUS_CLASS(status)) {
	case PVDMA_STATUS_OK:
		return 0;
	case PVDMA_STATUS_RETRY:
	case PVDMA_STATUS_LIMIT:
		return -ENOMEM;
	default:
		return -EREMOTEIO;
	}
}

static const char *pvdma_advice(u32 status)
{
	switch (PVDMA_STATUS_CLASS(status)) {
	case PVDMA_STATUS_RETRY:
		return "the host stayed busy";
	case PVDMA_STATUS_LIMIT:
		return "a limit of the host, may pass when other mappings go";
	case PVDMA_STATUS_GONE:
		return "the host no longer has the device";
	default:
		return "refused as a mistake of this guest";
	}
}

/* DMA_ATTR_NO_WARN: the driver knows how to wait for a limit, and will. */
static void pvdma_tell_map(struct pvdma_device *p, u64 bytes, u64 below,
			   u64 iova_max, u32 status, unsigned long attrs)
{
	if (PVDMA_STATUS_CLASS(status) == PVDMA_STATUS_GONE)
		pvdma_lose(p);
	if ((attrs & DMA_ATTR_NO_WARN) && pvdma_errno(status) == -ENOMEM)
		return;
	dev_warn_ratelimited(p->dev, "pvdma: no mapping of %llu bytes from %#llx below %#llx: %s (errno %u), %s\n",
			     bytes, below, iova_max, pvdma_status_name(status),
			     PVDMA_STATUS_ERRNO(status), pvdma_advice(status));
}

static void pvdma_tell_unmap(struct pvdma_device *p, u64 bytes, u64 iova,
			     u32 status)
{
	/* and with it this mapping */
	if (PVDMA_STATUS_CLASS(status) == PVDMA_STATUS_GONE) {
		pvdma_lose(p);
		return;
	}
	dev_warn_ratelimited(p->dev, "pvdma: %llu bytes at bus address %#llx stay mapped: %s (errno %u), %s\n",
			     bytes, iova, pvdma_status_name(status),
			     PVDMA_STATUS_ERRNO(status), pvdma_advice(status));
}

static bool pvdma_flush_all(void);

/*
 * After a map: is it worth another call, once? What is idle may be what is in its way,
 * at any device, since limits may be of a domain or of the VM. Then the first was no
 * operation given up, but a call that is repeated.
 */
static bool pvdma_worth_another(struct pvdma_device *p, u32 status, bool *again)
{
	if (likely(PVDMA_STATUS_CLASS(status) != PVDMA_STATUS_LIMIT) || *again ||
	    !pvdma_flush_all())
		return false;
	*again = true;
	this_cpu_dec(p->counters->errors[PVDMA_STATUS_LIMIT]);
	this_cpu_inc(p->counters->retries);
	return true;
}

/* Entries that a list call may have. */
static u32 pvdma_most_entries(void)
{
	return max(pvdma_host.list_entries, 1u);
}

/*
 * Counts of a mapping that needed no call, or of one that is counted here. Each add is
 * one instruction, so interrupts need not be off.
 */
static inline void pvdma_count_counted(struct pvdma_device *p, u64 pages)
{
	this_cpu_add(p->counters->pages_mapped, pages);
	this_cpu_inc(p->counters->outstanding);
}

static inline void pvdma_count_uncounted(struct pvdma_device *p, u64 pages)
{
	this_cpu_add(p->counters->pages_unmapped, pages);
	this_cpu_dec(p->counters->outstanding);
}

/* Whether the device can emit all addresses of a range, which has some. */
static __always_inline bool pvdma_within(u64 below, u64 bytes, u64 iova_max)
{
	return below <= iova_max && bytes - 1 <= iova_max - below;
}

/*
 * The usual case of policy cached, in as few instructions as it takes. Without a table
 * there are no pages, and it is never the case.
 */
static __always_inline bool pvdma_count_quickly(struct pvdma_device *p, u64 below,
						u64 bytes, u64 iova_max)
{
	return likely(pvdma_within(below, bytes, iova_max) &&
		      pvdma_table_count_one(&p->table, below, bytes));
}

/* Counts one range of a map, if the device can emit its addresses. Returns a status. */
static u32 pvdma_count_range(struct pvdma_device *p, u64 below, u64 bytes, u64 iova_max,
			     unsigned long attrs, bool *missing)
{
	u32 status = PVDMA_STATUS_INVALID;

	if (likely(pvdma_within(below, bytes, iova_max)))
		status = pvdma_table_count(&p->table, below, bytes, missing);
	if (unlikely(status)) {
		this_cpu_inc(p->counters->errors[status]);
		pvdma_tell_map(p, bytes, below, iova_max, status, attrs);
	}
	return status;
}

/* Calls the host for one range that is counted and not all pinned. */
static noinline u32 pvdma_call_counted(struct pvdma_device *p, u64 below, u64 bytes,
				       u64 iova_max, u32 flags, unsigned long attrs)
{
	struct pvdma_entry entry = { .address = below, .bytes = bytes };
	struct pvdma_list list = { .entries = &entry, .count = 1 };
	bool again = false;
	unsigned long irq;
	u32 status;

	do {
		local_irq_save(irq);
		status = pvdma_map_counted(&pvdma_host, this_cpu_ptr(p->counters), p->handle,
					   &list, 0, iova_max, flags);
		local_irq_restore(irq);
	} while (pvdma_worth_another(p, status, &again));
	if (unlikely(PVDMA_STATUS_CLASS(status))) {
		pvdma_table_uncount(&p->table, below, bytes);
		pvdma_tell_map(p, bytes, below, iova_max, status, attrs);
	}
	return status;
}

/* A mapping with policy cached: in most cases a count, and no more. */
static u32 pvdma_make_cached(struct pvdma_device *p, u64 below, u64 bytes,
			     u64 iova_max, u32 flags, unsigned long attrs)
{
	bool missing = false;
	u32 status = pvdma_count_range(p, below, bytes, iova_max, attrs, &missing);

	if (unlikely(status))
		return status;
	if (unlikely(missing)) {
		status = pvdma_call_counted(p, below, bytes, iova_max, flags, attrs);
		if (PVDMA_STATUS_CLASS(status))
			return status;
	}
	this_cpu_inc(p->counters->maps);
	pvdma_count_counted(p, pvdma_pages(below, bytes));
	return PVDMA_STATUS_OK;
}

/* Takes the counts of one range back; false, and nothing is changed, if it has none. */
static bool pvdma_uncount_range(struct pvdma_device *p, u64 iova, u64 bytes)
{
	if (likely(pvdma_table_uncount(&p->table, iova, bytes)))
		return true;
	this_cpu_inc(p->counters->errors[PVDMA_STATUS_INVALID]);
	dev_warn_ratelimited(p->dev, "pvdma: %llu bytes unmapped at bus address %#llx that are not mapped\n",
			     bytes, iova);
	return false;
}

static u32 pvdma_take_cached(struct pvdma_device *p, u64 iova, u64 bytes)
{
	if (unlikely(!pvdma_uncount_range(p, iova, bytes)))
		return PVDMA_STATUS_INVALID;
	this_cpu_inc(p->counters->unmaps);
	pvdma_count_uncounted(p, pvdma_pages(iova, bytes));
	return PVDMA_STATUS_OK;
}

/* Unmaps what the call page lists. Interrupts are off. */
static void pvdma_flush(struct pvdma_device *p, struct pvdma_entry *page, u32 count)
{
	struct pvdma_counters *counters = this_cpu_ptr(p->counters);
	struct pvdma_entry first = page[0];
	u32 failed = 0;
	u32 status;

	if (count == 1)
		status = pvdma_unmap(&pvdma_host, counters, p->handle, first.address,
				     first.bytes);
	else
		status = pvdma_unmap_list(&pvdma_host, counters, p->handle, page,
					  __pa(page), count, &failed);
	if (unlikely(PVDMA_STATUS_CLASS(status)))
		pvdma_tell_unmap(p, first.bytes, first.address, status);
}

/*
 * Policy lazy. What a driver has unmapped is idle until there are many, or for so
 * long. It counts as mapped, which it is.
 */
static unsigned int pvdma_lazy_ms = 10;
module_param_named(lazy_ms, pvdma_lazy_ms, uint, 0644);
MODULE_PARM_DESC(lazy_ms, "policy lazy: after so many milliseconds what was unmapped goes to the host, at the latest after about twice as many; 1 to 1000 (default 10)");

static unsigned long pvdma_lazy_period(void)
{
	return msecs_to_jiffies(clamp(READ_ONCE(pvdma_lazy_ms), 1u, 1000u));
}

/*
 * Unmaps what has been idle for longest and since @until at the latest; how many. With
 * interrupts off from the moment at which nobody else knows of it until it is unmapped:
 * pvdma_flush_last() waits for that.
 */
static u32 pvdma_flush_some(struct pvdma_device *p, struct pvdma_lazy *lazy, u32 most,
			    u64 until)
{
	struct pvdma_entry *page;
	unsigned long irq;
	u32 count;

	local_irq_save(irq);
	page = this_cpu_read(pvdma_call_page);
	raw_spin_lock(&p->lazy_lock);
	count = pvdma_lazy_take(lazy, page, min(most, pvdma_most_entries()), until);
	raw_spin_unlock(&p->lazy_lock);
	if (count)
		pvdma_flush(p, page, count);
	local_irq_restore(irq);
	return count;
}

/* Unmaps all that is idle, of all devices. */
static bool pvdma_flush_all(void)
{
	struct pvdma_device *p;
	u64 now = get_jiffies_64();	/* what others add meanwhile is not waited for */
	bool any = false;

	for (p = pvdma_devices; p < pvdma_devices + PVDMA_DEVICES_MAX; p++) {
		struct pvdma_lazy *lazy = READ_ONCE(p->lazy);

		while (lazy && pvdma_flush_some(p, lazy, U32_MAX, now))
			any = true;
	}
	return any;
}

void pvdma_flush_late(struct work_struct *work)
{
	struct pvdma_device *p = container_of(work, struct pvdma_device, lazy_flush.work);
	unsigned long period = pvdma_lazy_period();
	unsigned long irq;
	bool again;

	while (pvdma_flush_some(p, p->lazy, U32_MAX, get_jiffies_64() - period))
		cond_resched();
	raw_spin_lock_irqsave(&p->lazy_lock, irq);
	again = p->lazy->idle;
	p->lazy_due = again;
	raw_spin_unlock_irqrestore(&p->lazy_lock, irq);
	if (again)
		schedule_delayed_work(&p->lazy_flush, period);
}

/*
 * The driver has gone, and for it nobody maps or unmaps any more: nothing stays idle,
 * nor in the hands of another CPU that flushes because of another device's limit.
 */
void pvdma_flush_last(struct pvdma_device *p)
{
	if (!p->lazy)
		return;
	cancel_delayed_work_sync(&p->lazy_flush);
	p->lazy_due = false;
	while (pvdma_flush_some(p, p->lazy, U32_MAX, get_jiffies_64()))
		cond_resched();
	synchronize_rcu();
}

static bool pvdma_reuse(struct pvdma_device *p, u64 phys, u64 bytes, u64 iova_max,
			u32 flags, u64 *iova)
{
	unsigned long irq;
	bool found;

	raw_spin_lock_irqsave(&p->lazy_lock, irq);
	found = pvdma_lazy_reuse(p->lazy, phys, bytes, flags, iova_max, iova);
	raw_spin_unlock_irqrestore(&p->lazy_lock, irq);
	if (found)
		this_cpu_inc(p->counters->reused);
	return found;
}

static void pvdma_remember(struct pvdma_device *p, u64 phys, u64 bytes, u32 flags, u64 iova)
{
	unsigned long irq;

	raw_spin_lock_irqsave(&p->lazy_lock, irq);
	pvdma_lazy_made(p->lazy, phys, bytes, flags, iova);
	raw_spin_unlock_irqrestore(&p->lazy_lock, irq);
}

/* The same for what the call page lists. Interrupts are off. */
static bool pvdma_reuse_list(struct pvdma_device *p, const struct pvdma_list *list,
			     u64 iova_max, u32 flags, u64 *base)
{
	bool found;

	raw_spin_lock(&p->lazy_lock);
	found = pvdma_lazy_reuse_list(p->lazy, list, flags, iova_max, base);
	raw_spin_unlock(&p->lazy_lock);
	if (found)
		this_cpu_inc(p->counters->reused);
	return found;
}

static void pvdma_remember_list(struct pvdma_device *p, const struct pvdma_list *list,
				u32 flags, u64 base)
{
	raw_spin_lock(&p->lazy_lock);
	pvdma_lazy_made_list(p->lazy, list, flags, base);
	raw_spin_unlock(&p->lazy_lock);
}

/* The driver needs a mapping no longer: false when it has to be unmapped at once. */
static bool pvdma_let_idle(struct pvdma_device *p, u64 iova, u64 bytes)
{
	enum pvdma_idled idled;
	unsigned long irq;
	bool first, many;

	raw_spin_lock_irqsave(&p->lazy_lock, irq);
	idled = pvdma_lazy_idle(p->lazy, iova, bytes, get_jiffies_64());
	first = idled == PVDMA_IDLE && !p->lazy_due;
	if (first)
		p->lazy_due = true;
	many = p->lazy->idle >= pvdma_most_entries();
	raw_spin_unlock_irqrestore(&p->lazy_lock, irq);

	if (first)
		schedule_delayed_work(&p->lazy_flush, pvdma_lazy_period());
	/* the newer half may be needed again soon */
	if (many)
		pvdma_flush_some(p, p->lazy, max(pvdma_most_entries() / 2, 1u), get_jiffies_64());
	if (unlikely(idled == PVDMA_IDLE_ALREADY)) {
		this_cpu_inc(p->counters->errors[PVDMA_STATUS_INVALID]);
		dev_warn_ratelimited(p->dev, "pvdma: %llu bytes at bus address %#llx are unmapped twice\n",
				     bytes, iova);
	}
	return idled != PVDMA_NOT_KNOWN;
}

static __always_inline bool pvdma_map_quickly(struct pvdma_device *p, u64 below, u64 bytes,
					      u64 iova_max)
{
	if (!pvdma_count_quickly(p, below, bytes, iova_max))
		return false;
	this_cpu_inc(p->counters->maps);
	pvdma_count_counted(p, 1);
	return true;
}

static __always_inline bool pvdma_unmap_quickly(struct pvdma_device *p, u64 iova, u64 bytes)
{
	if (!pvdma_table_uncount_one(&p->table, iova, bytes))
		return false;
	this_cpu_inc(p->counters->unmaps);
	pvdma_count_uncounted(p, 1);
	return true;
}

/* Makes one mapping at the host. Returns the status; *iova is set if it is ok. */
u32 pvdma_make(struct pvdma_device *p, u64 below, u64 bytes, u64 iova_max,
	       u32 flags, unsigned long attrs, u64 *iova)
{
	bool again = false;
	unsigned long irq;
	u32 status;

	if (p->table.entries) {
		*iova = below;
		return pvdma_make_cached(p, below, bytes, iova_max, flags, attrs);
	}
	do {
		local_irq_save(irq);
		status = pvdma_map(&pvdma_host, this_cpu_ptr(p->counters), p->handle,
				   below, bytes, iova_max, flags, iova);
		local_irq_restore(irq);
	} while (pvdma_worth_another(p, status, &again));
	if (unlikely(PVDMA_STATUS_CLASS(status)))
		pvdma_tell_map(p, bytes, below, iova_max, status, attrs);
	return status;
}

/* Takes one mapping back. */
u32 pvdma_take(struct pvdma_device *p, u64 iova, u64 bytes)
{
	unsigned long irq;
	u32 status;

	if (p->table.entries)
		return pvdma_take_cached(p, iova, bytes);
	local_irq_save(irq);
	status = pvdma_unmap(&pvdma_host, this_cpu_ptr(p->counters), p->handle,
			     iova, bytes);
	local_irq_restore(irq);
	if (unlikely(PVDMA_STATUS_CLASS(status)))
		pvdma_tell_unmap(p, bytes, iova, status);
	return status;
}

static noinline dma_addr_t pvdma_map_slowly(struct pvdma_device *p, struct device *dev,
					    phys_addr_t phys, size_t size, u64 iova_max,
					    enum dma_data_direction dir,
					    unsigned long attrs)
{
	u32 flags = pvdma_streaming_flags(p, dev, dir);
	u64 iova;

	/* a device that is gone has nothing mapped, whatever the books say */
	if (p->lazy && !READ_ONCE(p->lost) && pvdma_reuse(p, phys, size, iova_max, flags, &iova))
		return iova;
	if (PVDMA_STATUS_CLASS(pvdma_make(p, phys, size, iova_max, flags, attrs, &iova)))
		return DMA_MAPPING_ERROR;
	if (p->lazy)
		pvdma_remember(p, phys, size, flags, iova);
	return iova;
}

static __always_inline dma_addr_t pvdma_map_phys(struct device *dev, phys_addr_t phys,
						 size_t size, enum dma_data_direction dir,
						 unsigned long attrs)
{
	struct pvdma_device *p = pvdma_of(dev);
	u64 iova_max;

	if (unlikely(!p))
		return DMA_MAPPING_ERROR;
	iova_max = pvdma_streaming_max(p, dev);
	if (likely(pvdma_map_quickly(p, phys, size, iova_max)))
		return phys;
	return pvdma_map_slowly(p, dev, phys, size, iova_max, dir, attrs);
}

static noinline void pvdma_unmap_slowly(struct pvdma_device *p, dma_addr_t iova, size_t size)
{
	if (!(p->lazy && pvdma_let_idle(p, iova, size)))
		pvdma_take(p, iova, size);
}

static void pvdma_unmap_phys(struct device *dev, dma_addr_t iova, size_t size,
			     enum dma_data_direction dir, unsigned long attrs)
{
	struct pvdma_device *p = pvdma_of(dev);

	if (likely(p) && !pvdma_unmap_quickly(p, iova, size))
		pvdma_unmap_slowly(p, iova, size);
}

#if !PVDMA_MAP_PHYS
static dma_addr_t pvdma_map_page(struct device *dev, struct page *page,
				 unsigned long offset, size_t size,
				 enum dma_data_direction dir, unsigned long attrs)
{
	return pvdma_map_phys(dev, page_to_phys(page) + offset, size, dir, attrs);
}
#endif

/* What rules a device's lists, and an empty list under them. */
static void pvdma_start(struct pvdma_list *list, struct pvdma_entry *page,
			const struct pvdma_device *p, struct device *dev)
{
	pvdma_list_start(list, page, p->list_entries, pvdma_host.map_pages,
			 dma_get_seg_boundary(dev));
}

/*
 * Puts as many of the left entries from *sg on into the list as belong there, and
 * moves *sg past them. Entries without bytes are passed over.
 */
static int pvdma_fill(struct pvdma_list *list, struct scatterlist **sg, int left)
{
	int n;

	for (n = 0; n < left; n++, *sg = sg_next(*sg)) {
		if ((*sg)->length && !pvdma_list_add(list, sg_phys(*sg), (*sg)->length))
			break;
	}
	return n;
}

/* Maps what the call page lists, which has entries. Interrupts are off. */
static u32 pvdma_make_list(struct pvdma_device *p, const struct pvdma_list *list,
			   u64 iova_max, u32 flags, u64 *base)
{
	u32 status;

	lockdep_assert_irqs_disabled();
	/* a device that is gone has nothing mapped, whatever the books say */
	if (p->lazy && !READ_ONCE(p->lost) && pvdma_reuse_list(p, list, iova_max, flags, base))
		return PVDMA_STATUS_OK;
	status = pvdma_map_list(&pvdma_host, this_cpu_ptr(p->counters), p->handle, list,
				__pa(list->entries), iova_max, flags, base);
	if (p->lazy && !PVDMA_STATUS_CLASS(status))
		pvdma_remember_list(p, list, flags, *base);
	return status;
}

/*
 * Maps the next range of a scatterlist: *sg moves past its entries, *base is its
 * first address. Returns the number of entries or a negative errno.
 */
static int pvdma_map_range(struct pvdma_device *p, struct device *dev,
			   struct scatterlist **sg, int left, u64 iova_max,
			   u32 flags, unsigned long attrs, u64 *base)
{
	struct scatterlist *first = *sg;
	u64 below = sg_phys(first);
	struct pvdma_list list;
	bool again = false;
	unsigned long irq;
	u32 status = PVDMA_STATUS_OK;
	int n;

	do {
		*sg = first;
		local_irq_save(irq);
		pvdma_start(&list, this_cpu_read(pvdma_call_page), p, dev);
		n = pvdma_fill(&list, sg, left);
		if (likely(list.count))
			status = pvdma_make_list(p, &list, iova_max, flags, base);
		local_irq_restore(irq);
	} while (pvdma_worth_another(p, status, &again));

	if (unlikely(!list.count))
		return -EINVAL;
	if (unlikely(PVDMA_STATUS_CLASS(status))) {
		pvdma_tell_map(p, list.bytes, below, iova_max, status, attrs);
		return pvdma_errno(status);
	}
	return n;
}

/*
 * Unmaps the first nents entries of a scatterlist. The entries' pages and lengths
 * are as they were, so they fall into the same ranges again; where a range begins
 * stands in its first segment, and its segments are as long as its entries.
 */
static void pvdma_unmap_entries(struct pvdma_device *p, struct device *dev,
				struct scatterlist *sgl, int nents)
{
	struct scatterlist *sg = sgl, *segment = sgl;
	u32 most = pvdma_most_entries();
	struct pvdma_entry *page;
	struct pvdma_list list;
	unsigned long irq;
	u32 count = 0;
	u64 base, bytes;

	local_irq_save(irq);
	page = this_cpu_read(pvdma_call_page);
	while (nents > 0 && segment) {
		pvdma_start(&list, NULL, p, dev);
		nents -= pvdma_fill(&list, &sg, nents);
		if (!list.count)
			break;
		base = sg_dma_address(segment) & PAGE_MASK;
		bytes = list.pages << PAGE_SHIFT;
		if (p->lazy) {	/* which needs the call page itself */
			if (!pvdma_let_idle(p, base, bytes))
				pvdma_take(p, base, bytes);
		} else {
			page[count].address = base;
			page[count].bytes = bytes;
			if (++count == most) {
				pvdma_flush(p, page, count);
				count = 0;
			}
		}
		for (bytes = list.bytes; bytes && segment; segment = sg_next(segment))
			bytes -= min_t(u64, bytes, sg_dma_len(segment));
	}
	if (count)
		pvdma_flush(p, page, count);
	local_irq_restore(irq);
}

/* The segments of a list on their way into its entries' DMA fields. */
struct pvdma_segments {
	struct scatterlist *first;
	struct scatterlist *last;	/* the one being made; NULL: none yet */
	struct pvdma_segment segment;
	u64 boundary;
	u64 max_bytes;
	int count;
};

static void pvdma_segments_start(struct pvdma_segments *s, struct device *dev,
				 struct scatterlist *sgl)
{
	s->first = sgl;
	s->last = NULL;
	s->boundary = dma_get_seg_boundary(dev);
	s->max_bytes = dma_get_max_seg_size(dev);
	s->count = 0;
}

/* Appends a piece: to the last segment unless @fresh, or as one of its own. */
static void pvdma_segments_add(struct pvdma_segments *s, u64 iova, u64 bytes, bool fresh)
{
	if (fresh || !s->last ||
	    !pvdma_segment_join(&s->segment, iova, bytes, s->max_bytes, s->boundary)) {
		s->segment.iova = iova;
		s->segment.bytes = bytes;
		s->last = s->last ? sg_next(s->last) : s->first;
		s->count++;
	}
	sg_dma_address(s->last) = s->segment.iova;
	sg_dma_len(s->last) = s->segment.bytes;
}

/* Marks the end of a list of @nents entries; returns its segments. */
static int pvdma_segments_end(struct pvdma_segments *s, int nents)
{
	if (s->count && s->count < nents)
		sg_dma_len(sg_next(s->last)) = 0;
	return s->count;
}

/* sg_next(), without a call unless the entry is the last, or of a table. */
static __always_inline struct scatterlist *pvdma_sg_next(struct scatterlist *sg)
{
	return likely(!sg_is_last(sg) && !sg_is_chain(sg + 1)) ? sg + 1 : sg_next(sg);
}

/* Takes back the counts of the first nents entries; returns the pages that had one. */
static u64 pvdma_uncount_entries(struct pvdma_device *p, struct scatterlist *sgl,
				 int nents)
{
	struct scatterlist *sg = sgl;
	u64 pages = 0;
	int i;

	for (i = 0; i < nents; i++, sg = pvdma_sg_next(sg)) {
		u64 below = sg_phys(sg);
		u64 bytes = sg->length;

		if (likely(pvdma_table_uncount_one(&p->table, below, bytes)))
			pages++;
		else if (bytes && pvdma_uncount_range(p, below, bytes))
			pages += pvdma_pages(below, bytes);
	}
	return pages;
}

/* Has the host map a list that is counted and not all pinned. */
static noinline u32 pvdma_call_counted_list(struct pvdma_device *p,
					    struct scatterlist *sg, int nents, u64 iova_max,
					    u32 flags, unsigned long attrs)
{
	while (nents > 0) {
		struct scatterlist *first = sg;
		u64 below = sg_phys(sg);
		struct pvdma_list list;
		bool again = false;
		unsigned long irq;
		u32 status = PVDMA_STATUS_OK;
		int n;

		do {
			sg = first;
			local_irq_save(irq);
			/* no address to be found for the whole, so no boundary */
			pvdma_list_start(&list, this_cpu_read(pvdma_call_page),
					 pvdma_most_entries(), pvdma_host.map_pages,
					 U64_MAX);
			n = pvdma_fill(&list, &sg, nents);
			if (likely(list.count))
				status = pvdma_map_counted(&pvdma_host,
							   this_cpu_ptr(p->counters),
							   p->handle, &list,
							   __pa(list.entries),
							   iova_max, flags);
			local_irq_restore(irq);
		} while (pvdma_worth_another(p, status, &again));
		nents -= n;
		if (unlikely(PVDMA_STATUS_CLASS(status))) {
			pvdma_tell_map(p, list.bytes, below, iova_max, status, attrs);
			return status;
		}
	}
	return PVDMA_STATUS_OK;
}

/* A list with policy cached: a count per page, and a call if one is not pinned. */
static int pvdma_map_sg_cached(struct pvdma_device *p, struct device *dev,
			       struct scatterlist *sgl, int nents, u64 iova_max,
			       u32 flags, unsigned long attrs)
{
	struct pvdma_segments segments;
	struct scatterlist *sg = sgl;
	bool missing = false;
	u64 pages = 0;
	u32 status;
	int i;

	pvdma_segments_start(&segments, dev, sgl);
	for (i = 0; i < nents; i++, sg = pvdma_sg_next(sg)) {
		u64 below = sg_phys(sg);
		u64 bytes = sg->length;

		if (pvdma_count_quickly(p, below, bytes, iova_max)) {
			pages++;
		} else if (bytes) {
			status = pvdma_count_range(p, below, bytes, iova_max, attrs, &missing);
			if (unlikely(status))
				goto undo;
			pages += pvdma_pages(below, bytes);
		} else {
			continue;
		}
		pvdma_segments_add(&segments, below, bytes, false);
	}
	if (unlikely(!segments.count))
		return -EINVAL;
	if (unlikely(missing)) {
		status = pvdma_call_counted_list(p, sgl, nents, iova_max, flags, attrs);
		if (PVDMA_STATUS_CLASS(status))
			goto undo;
	}
	this_cpu_inc(p->counters->map_lists);
	pvdma_count_counted(p, pages);
	return pvdma_segments_end(&segments, nents);

undo:
	pvdma_uncount_entries(p, sgl, i);
	return pvdma_errno(status);
}

static int pvdma_map_sg(struct device *dev, struct scatterlist *sgl, int nents,
			enum dma_data_direction dir, unsigned long attrs)
{
	struct pvdma_device *p = pvdma_of(dev);
	struct scatterlist *sg = sgl, *entry;
	struct pvdma_segments segments;
	u64 iova_max, base;
	int done, n, i;
	u32 flags;

	if (unlikely(!p || nents <= 0))
		return -EINVAL;
	if (IS_ENABLED(CONFIG_PCI_P2PDMA)) {
		for_each_sg(sgl, entry, nents, i) {
			if (is_pci_p2pdma_page(sg_page(entry)))
				return -EREMOTEIO;
		}
	}

	iova_max = pvdma_streaming_max(p, dev);
	flags = pvdma_streaming_flags(p, dev, dir);
	if (p->table.entries)
		return pvdma_map_sg_cached(p, dev, sgl, nents, iova_max, flags, attrs);
	pvdma_segments_start(&segments, dev, sgl);
	for (done = 0; done < nents; done += n) {
		bool fresh = true;	/* a range never joins the one before it */

		entry = sg;
		n = pvdma_map_range(p, dev, &sg, nents - done, iova_max, flags,
				    attrs, &base);
		if (unlikely(n < 0)) {
			pvdma_unmap_entries(p, dev, sgl, done);
			/* the next try shall not find them where the rest had no room */
			if (p->lazy && done)
				pvdma_flush_all();
			return n;
		}
		for (i = 0; i < n; i++, entry = sg_next(entry)) {
			u64 iova;

			if (!entry->length)
				continue;
			iova = pvdma_place(&base, sg_phys(entry), entry->length);
			pvdma_segments_add(&segments, iova, entry->length, fresh);
			fresh = false;
		}
	}
	return pvdma_segments_end(&segments, nents);
}

static void pvdma_unmap_sg(struct device *dev, struct scatterlist *sgl, int nents,
			   enum dma_data_direction dir, unsigned long attrs)
{
	struct pvdma_device *p = pvdma_of(dev);

	if (unlikely(!p || nents <= 0))
		return;
	if (p->table.entries) {
		u64 pages = pvdma_uncount_entries(p, sgl, nents);

		if (likely(pages)) {
			this_cpu_inc(p->counters->unmap_lists);
			pvdma_count_uncounted(p, pages);
		}
		return;
	}
	pvdma_unmap_entries(p, dev, sgl, nents);
}

/*
 * Memory for both sides. Where addresses are translated any page will do: no zones,
 * no bounce buffers. Identity addresses have to be below the device's limit.
 */
struct page *pvdma_get_pages(struct device *dev, size_t size, gfp_t gfp)
{
	const struct pvdma_device *p = pvdma_of(dev);

	if (unlikely(!size))
		return NULL;
	if (p && p->table.entries) {
		u64 most = pvdma_coherent_max(p, dev);

		if (most < pvdma_last_of_ram(p))
			gfp |= most < DMA_BIT_MASK(32) ? GFP_DMA : GFP_DMA32;
	}
	return alloc_pages_node(dev_to_node(dev), (gfp & ~__GFP_COMP) | __GFP_ZERO,
				get_order(size));
}

/* Gives memory back, if no device can reach it any more. */
void pvdma_put_pages(struct device *dev, struct page *page, size_t size,
		     dma_addr_t iova, bool unreachable)
{
	if (likely(unreachable))
		__free_pages(page, get_order(size));
	else	/* lost memory does less harm than memory a device still writes to */
		dev_err(dev, "pvdma: %zu bytes at bus address %pad are never freed: the device may still reach them\n",
			size, &iova);
}

/*
 * Drivers may give memory back long after they are unbound: nvme does when its last
 * file is closed. What was mapped for it is released by then, and its bus address is
 * perhaps another's. So the memory is known by its first page, with the era in which
 * it was mapped. (The XArray would sleep with interrupts on, whatever they were.)
 */
static int pvdma_remember_memory(struct pvdma_device *p, struct page *page)
{
	unsigned long irq;
	int err;

	xa_lock_irqsave(&p->memory, irq);
	err = xa_err(__xa_store(&p->memory, page_to_pfn(page), xa_mk_value(p->era),
				GFP_ATOMIC | __GFP_NOWARN));
	xa_unlock_irqrestore(&p->memory, irq);
	return err;
}

/* True when what was mapped for this memory has been released. */
static bool pvdma_forget_memory(struct pvdma_device *p, struct page *page)
{
	unsigned long irq;
	bool released;
	void *era;

	xa_lock_irqsave(&p->memory, irq);
	era = __xa_erase(&p->memory, page_to_pfn(page));
	released = era && xa_to_value(era) != p->era;
	xa_unlock_irqrestore(&p->memory, irq);
	return released;
}

static struct page *pvdma_alloc_pages(struct device *dev, size_t size,
				      dma_addr_t *iova,
				      enum dma_data_direction dir, gfp_t gfp)
{
	struct pvdma_device *p = pvdma_of(dev);
	struct page *page;
	u64 address;

	if (unlikely(!p))
		return NULL;
	page = pvdma_get_pages(dev, size, gfp);
	if (!page)
		return NULL;
	if (PVDMA_STATUS_CLASS(pvdma_make(p, page_to_phys(page), PAGE_ALIGN(size),
					  pvdma_coherent_max(p, dev),
					  pvdma_coherent_flags(p, dir), 0,
					  &address)))
		goto free;
	if (pvdma_remember_memory(p, page)) {
		if (!pvdma_unreachable(pvdma_take(p, address, PAGE_ALIGN(size))))
			return NULL;	/* and the memory is lost */
		goto free;
	}
	*iova = address;
	return page;

free:
	__free_pages(page, get_order(size));
	return NULL;
}

static void pvdma_free_pages(struct device *dev, size_t size, struct page *page,
			     dma_addr_t iova, enum dma_data_direction dir)
{
	struct pvdma_device *p = pvdma_of(dev);
	bool late = p && pvdma_forget_memory(p, page);
	bool unreachable = late || (p && pvdma_unreachable(pvdma_take(p, iova,
								      PAGE_ALIGN(size))));

	pvdma_put_pages(dev, page, size, iova, unreachable);
	if (late)
		pvdma_count_late(p);
	/* last, since the module may go after it; the work looks at the driver again */
	if (p && xa_empty(&p->memory) && unlikely(!READ_ONCE(dev->driver)))
		pvdma_memory_is_back(p);
}

static void *pvdma_alloc(struct device *dev, size_t size, dma_addr_t *iova,
			 gfp_t gfp, unsigned long attrs)
{
	struct page *page = pvdma_alloc_pages(dev, size, iova, DMA_BIDIRECTIONAL, gfp);

	return page ? page_address(page) : NULL;
}

static void pvdma_free(struct device *dev, size_t size, void *vaddr,
		       dma_addr_t iova, unsigned long attrs)
{
	pvdma_free_pages(dev, size, virt_to_page(vaddr), iova, DMA_BIDIRECTIONAL);
}

static int pvdma_mmap(struct device *dev, struct vm_area_struct *vma, void *vaddr,
		      dma_addr_t iova, size_t size, unsigned long attrs)
{
	unsigned long pages = PAGE_ALIGN(size) >> PAGE_SHIFT;
	unsigned long wanted = vma_pages(vma);

	if (vma->vm_pgoff >= pages || wanted > pages - vma->vm_pgoff)
		return -ENXIO;
	return remap_pfn_range(vma, vma->vm_start,
			       page_to_pfn(virt_to_page(vaddr)) + vma->vm_pgoff,
			       wanted << PAGE_SHIFT, vma->vm_page_prot);
}

static int pvdma_get_sgtable(struct device *dev, struct sg_table *sgt, void *vaddr,
			     dma_addr_t iova, size_t size, unsigned long attrs)
{
	int ret = sg_alloc_table(sgt, 1, GFP_KERNEL);

	if (!ret)
		sg_set_page(sgt->sgl, virt_to_page(vaddr), PAGE_ALIGN(size), 0);
	return ret;
}

/*
 * Translated addresses are the host's to choose: a mask is enough if it covers some.
 * With identity addresses all of memory has to be below it, since nothing is bounced.
 */
int pvdma_dma_supported(struct device *dev, u64 mask)
{
	const struct pvdma_device *p = pvdma_of(dev);

	if (!p || !p->table.entries)
		return mask >= pvdma_first_iova + PAGE_SIZE - 1;
	if (min(mask, p->iova_last) >= pvdma_last_of_ram(p))
		return 1;
	dev_err_ratelimited(dev, "pvdma: its mask %#llx does not cover all memory, which ends at %#llx, as policy cached needs: assign it with dma=strict\n",
			    mask, pvdma_last_of_ram(p));
	return 0;
}

/*
 * The mask with which all memory can be used directly. Translated addresses are
 * made to fit the mask there is, identity addresses go as high as RAM does.
 */
u64 pvdma_get_required_mask(struct device *dev)
{
	struct pvdma_device *p = pvdma_of(dev);

	if (p && p->table.entries)
		return DMA_BIT_MASK(fls64(pvdma_last_of_ram(p)));
	return min_t(u64, dma_get_mask(dev), DMA_BIT_MASK(32));
}

/* What drivers cut their requests to: see pvdma_mapping_max(). */
size_t pvdma_max_mapping_size(struct device *dev)
{
	struct pvdma_device *p = pvdma_of(dev);

	return likely(p) ? p->mapping_max : PAGE_SIZE;
}

/*
 * Left out on purpose:
 * get_merge_boundary: it promises that any list whose inner ends are page aligned
 * becomes one segment. A list longer than a call page becomes several, so the
 * promise would be broken where it is relied on (MMC takes one segment to be one).
 * Lists are merged all the same. NVMe on 6.1 and 6.12 does not ask.
 * opt_mapping_size: is not told for which device. Without it max_mapping_size is both.
 * sync_*: x86 is coherent and nothing is bounced; without them 6.12 skips the calls.
 * alloc_noncontiguous, cache_sync: the DMA core does without.
 */
const struct dma_map_ops pvdma_direct_ops = {
	.alloc = pvdma_alloc,
	.free = pvdma_free,
	.pvdma_op_alloc_pages = pvdma_alloc_pages,
	.free_pages = pvdma_free_pages,
	.mmap = pvdma_mmap,
	.get_sgtable = pvdma_get_sgtable,
#if PVDMA_MAP_PHYS
	.map_phys = pvdma_map_phys,
	.unmap_phys = pvdma_unmap_phys,
#else
	.map_page = pvdma_map_page,
	.unmap_page = pvdma_unmap_phys,
	.map_resource = pvdma_map_phys,
	.unmap_resource = pvdma_unmap_phys,
#endif
	.map_sg = pvdma_map_sg,
	.unmap_sg = pvdma_unmap_sg,
	.dma_supported = pvdma_dma_supported,
	.get_required_mask = pvdma_get_required_mask,
	.max_mapping_size = pvdma_max_mapping_size,
};

#if PVDMA_MAP_PHYS
static dma_addr_t pvdma_refuse_map(struct device *dev, phys_addr_t phys, size_t size,
				   enum dma_data_direction dir, unsigned long attrs)
#else
static dma_addr_t pvdma_refuse_map(struct device *dev, struct page *page,
				   unsigned long offset, size_t size,
				   enum dma_data_direction dir, unsigned long attrs)
#endif
{
	return DMA_MAPPING_ERROR;
}

static void pvdma_refuse_unmap(struct device *dev, dma_addr_t iova, size_t size,
			       enum dma_data_direction dir, unsigned long attrs)
{
}

static int pvdma_refuse_map_sg(struct device *dev, struct scatterlist *sgl, int nents,
			       enum dma_data_direction dir, unsigned long attrs)
{
	return -EREMOTEIO;
}

static int pvdma_refuse_mask(struct device *dev, u64 mask)
{
	return 0;
}

/* What is left out the DMA core takes for a failure, or for nothing to do. */
const struct dma_map_ops pvdma_refusing_ops = {
#if PVDMA_MAP_PHYS
	.map_phys = pvdma_refuse_map,
	.unmap_phys = pvdma_refuse_unmap,
#else
	.map_page = pvdma_refuse_map,
	.unmap_page = pvdma_refuse_unmap,
#endif
	.map_sg = pvdma_refuse_map_sg,
	.dma_supported = pvdma_refuse_mask,
};
