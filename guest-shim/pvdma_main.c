// SPDX-License-Identifier: GPL-2.0
/*
 * pvdma.ko: finds the host, and puts its DMA operations under every assigned PCI
 * device just before a driver probes it. This file knows devices and drivers and
 * when things begin and end; it maps nothing.
 *
 * Order of locks: the device's lock, then pvdma_lock. Notifications about drivers
 * come with the device's lock held.
 */
#define pr_fmt(fmt) "pvdma: " fmt

#include <linux/cc_platform.h>
#include <linux/init.h>
#include <linux/io.h>
#include <linux/mm.h>
#include <linux/module.h>
#include <linux/mutex.h>
#include <linux/pci.h>
#include <linux/slab.h>

#include "pvdma.h"

struct pvdma_host pvdma_host;
u64 pvdma_first_iova;
struct pvdma_device pvdma_devices[PVDMA_DEVICES_MAX];
static struct pvdma_table pvdma_tables[PVDMA_DEVICES_MAX];
DEFINE_PER_CPU(struct pvdma_entry *, pvdma_call_page);
DEFINE_PER_CPU(struct pvdma_counters, pvdma_counters);

/*
 * Every device the host was asked about, by its address: an entry of
 * pvdma_devices, or PVDMA_NOT_OURS. So no device is asked about twice.
 */
static DEFINE_XARRAY(pvdma_known);
#define PVDMA_NOT_OURS	xa_mk_value(0)
static DEFINE_MUTEX(pvdma_lock);
static struct workqueue_struct *pvdma_queue;

/* Slow way to a device, for callers that come through ops stacked over ours. */
struct pvdma_device *pvdma_find(const struct device *dev)
{
	int i;

	for (i = 0; i < PVDMA_DEVICES_MAX; i++) {
		if (READ_ONCE(pvdma_devices[i].dev) == dev)
			return &pvdma_devices[i];
	}
	return NULL;
}

/* Devices that can do without us: nothing has to be mapped, iova = gpa. */
static bool pvdma_needs_no_ops(const struct pvdma_device *p)
{
	return p->policy == PVDMA_POLICY_PINNED && p->identity;
}

/* Whether another device that has a driver is counted in the same tracking table. */
static bool pvdma_table_shared(const struct pvdma_device *p)
{
	const struct pvdma_device *other;

	for (other = pvdma_devices; other < pvdma_devices + PVDMA_DEVICES_MAX; other++) {
		if (other != p && other->dev && other->installed &&
		    other->table.gpa == p->table.gpa)
			return true;
	}
	return false;
}

static bool pvdma_can_release(const struct pvdma_device *p)
{
	/* over a lower layer, what is unmapped late has to be found at the host */
	if (!xa_empty(&p->below))
		return false;
	/* counts do not say whose they are */
	if (p->table.entries)
		return !pvdma_table_shared(p);
	return !p->identity && pvdma_host.features & PVDMA_FEATURE_RELEASE;
}

/* Takes back what is mapped for a device, or, if it has a table, for its domain. */
static u32 pvdma_release_all(struct pvdma_device *p, struct pvdma_released *released)
{
	struct pvdma_table table;
	unsigned long irq;
	u32 status;

	local_irq_save(irq);
	if (p->table.entries)
		status = pvdma_find_table(&pvdma_host, this_cpu_ptr(p->counters),
					  p->handle, true, &table);
	else
		status = pvdma_release(&pvdma_host, this_cpu_ptr(p->counters),
				       p->handle, released);
	local_irq_restore(irq);
	return status;
}

/* Nothing is mapped: nothing is remembered, what a driver has leaked neither. */
static void pvdma_lazy_anew(struct pvdma_device *p)
{
	raw_spin_lock_irq(&p->lazy_lock);
	pvdma_lazy_start(p->lazy);
	raw_spin_unlock_irq(&p->lazy_lock);
}

/*
 * Takes back at the host all that is mapped for a device without a driver: what its
 * last one left, what the host could not unmap, what a kernel before this one had.
 * Bus mastering goes off first, since nothing may be unpinned that a device still
 * writes to; drivers turn it on in their probe, the PCI core needs it for nothing.
 * Called with pvdma_lock.
 */
static void pvdma_reclaim(struct pvdma_device *p)
{
	struct pvdma_released released = { 0 };
	u32 status;

	if (!pvdma_can_release(p)) {
		/* what its domain has mapped stays for the others, but not for it */
		if (p->table.entries)
			pci_clear_master(to_pci_dev(p->dev));
		return;
	}
	pci_clear_master(to_pci_dev(p->dev));
	status = pvdma_release_all(p, &released);
	/* a domain does not go with one of its devices: nothing was released */
	if (p->table.entries && PVDMA_STATUS_CLASS(status) == PVDMA_STATUS_GONE)
		return;
	p->unclean = !pvdma_unreachable(status);
	if (p->unclean) {
		dev_err(p->dev, "pvdma: the host has not released all that is mapped: %s (errno %u); binding a driver asks again\n",
			pvdma_status_name(status), PVDMA_STATUS_ERRNO(status));
		return;
	}
	if (released.mappings)
		dev_info(p->dev, "pvdma: the host released %llu mappings (%llu bytes)\n",
			 released.mappings, released.bytes);
	pvdma_nothing_outstanding(p);
	p->stale = 0;
	if (p->lazy)
		pvdma_lazy_anew(p);
	xa_lock_irq(&p->memory);
	p->era++;
	xa_unlock_irq(&p->memory);
}

static void pvdma_tell_left(struct pvdma_device *p, s64 mappings, const char *why)
{
	if (mappings > 0)
		dev_warn(p->dev, "pvdma: %lld mappings left %s, %llu bytes are mapped%s\n",
			 mappings, why, pvdma_outstanding_bytes(p),
			 pvdma_can_release(p) ? "" : "; the host keeps them");
}

/*
 * Says what is still mapped when a driver has gone: its leak is what it never
 * unmapped, not what the host would not unmap. False: nothing. With pvdma_lock.
 */
static bool pvdma_report_left(struct pvdma_device *p)
{
	s64 all = pvdma_outstanding(p) - p->stale;
	s64 stuck = min(all, pvdma_stuck(p));

	pvdma_tell_left(p, all - stuck, "behind by the driver");
	pvdma_tell_left(p, stuck, "because the host did not unmap them");
	pvdma_count_left(p, all - stuck);
	p->stale += all;
	return all > 0;
}

/*
 * Leaves nothing mapped and takes the ops out again. But the ops, and with them the
 * module, stay while the driver that is gone still has memory of ours: it goes back
 * the way it came, or not at all. Called with pvdma_lock.
 */
static void pvdma_uninstall(struct pvdma_device *p)
{
	struct device *dev = p->dev;
	bool left;

	if (!p->installed)
		return;
	if (get_dma_ops(dev) != &p->ops) {
		dev_warn(dev, "pvdma: other DMA ops lie over ours, which stay: remove those first\n");
		return;
	}
	pvdma_flush_last(p);
	left = pvdma_report_left(p);
	pvdma_reclaim(p);
	if (!xa_empty(&p->memory) || !xa_empty(&p->below)) {
		if (left)
			dev_info(dev, "pvdma: the DMA ops stay until the driver's memory is given back\n");
		return;
	}
	set_dma_ops(dev, p->lower);
	WRITE_ONCE(p->lazy, NULL);
	p->installed = false;
	put_device(dev);
	module_put(THIS_MODULE);
}

/* Frees the slot of a device that is no longer on the bus. With pvdma_lock. */
static void pvdma_drop(struct pvdma_device *p)
{
	pvdma_stats_remove(p);
	WRITE_ONCE(p->dev, NULL);
}

/*
 * A probe that failed: what the driver took by devres is given back only after
 * the notification, and has to go back the way it came. So wait for the device's
 * lock and look again. And memory that came back when its driver had long gone.
 */
static void pvdma_settle(struct work_struct *work)
{
	struct pvdma_device *p = container_of(work, struct pvdma_device, settle);
	struct device *dev = p->dev;

	device_lock(dev);
	if (!dev->driver) {
		mutex_lock(&pvdma_lock);
		pvdma_uninstall(p);
		if (p->removed && !p->installed)
			pvdma_drop(p);
		mutex_unlock(&pvdma_lock);
	}
	device_unlock(dev);
	put_device(dev);
}

/* The last memory that an earlier driver had is back. From any context. */
void pvdma_memory_is_back(struct pvdma_device *p)
{
	get_device(p->dev);
	if (!queue_work(pvdma_queue, &p->settle))
		put_device(p->dev);
}

struct pvdma_loss {
	struct work_struct work;
	struct pci_dev *pdev;
};

static void pvdma_remove_lost(struct work_struct *work)
{
	struct pvdma_loss *loss = container_of(work, struct pvdma_loss, work);

	pci_err(loss->pdev, "pvdma: the host no longer has this device: removed\n");
	loss->pdev->error_state = pci_channel_io_perm_failure;
	pci_stop_and_remove_bus_device_locked(loss->pdev);
	pci_dev_put(loss->pdev);
	kfree(loss);
}

/*
 * The host no longer has the device. Its driver does not know: a map that fails has
 * no reasons, so that nvme would try single pages again for ever, those of its own
 * reset included. To the guest this is a card that was pulled out: nobody answers at
 * its address, and its driver goes, which ends whatever waits. From any context.
 */
void pvdma_lose(struct pvdma_device *p)
{
	struct pvdma_loss *loss;

	if (xchg(&p->lost, true))
		return;
	loss = kmalloc(sizeof(*loss), GFP_ATOMIC | __GFP_NOWARN);
	if (!loss) {	/* the next call that fails tries again */
		WRITE_ONCE(p->lost, false);
		return;
	}
	INIT_WORK(&loss->work, pvdma_remove_lost);
	loss->pdev = pci_dev_get(to_pci_dev(p->dev));
	queue_work(pvdma_queue, &loss->work);
}

/*
 * How often the bus is asked whether the devices are there, milliseconds. Who makes
 * calls is told by them, but with policies cached and lazy drivers may make none for
 * long, under pinned they never do, and one that waits has no reason to.
 */
#define PVDMA_WATCH_MS	2000

static void pvdma_watch(struct work_struct *work)
{
	struct pvdma_device *p;
	u16 vendor;

	mutex_lock(&pvdma_lock);
	for (p = pvdma_devices; p < pvdma_devices + PVDMA_DEVICES_MAX; p++) {
		if (!p->dev || p->removed)
			continue;
		pci_read_config_word(to_pci_dev(p->dev), PCI_VENDOR_ID, &vendor);
		if (PCI_POSSIBLE_ERROR(vendor))
			pvdma_lose(p);
	}
	mutex_unlock(&pvdma_lock);
	queue_delayed_work(pvdma_queue, to_delayed_work(work),
			   msecs_to_jiffies(PVDMA_WATCH_MS));
}

static DECLARE_DELAYED_WORK(pvdma_watching, pvdma_watch);

/* Puts our ops over the device's, before its driver probes. With pvdma_lock. */
static void pvdma_install(struct pvdma_device *p)
{
	struct device *dev = p->dev;

	/* of a probe that failed: what it had by devres has been given back by now */
	pvdma_uninstall(p);
	if (p->installed)
		return;
	if (pvdma_ops_ignored(dev)) {
		dev_err(dev, "pvdma: not served: this kernel takes DMA of a device behind a virtual IOMMU past its ops; boot with iommu=pt\n");
		return;
	}
	p->lower = get_dma_ops(dev);
	if (!p->lower) {
		p->ops = pvdma_direct_ops;
	} else if (!pvdma_stack_ops(&p->ops, p->lower)) {
		dev_err(dev, "pvdma: not served: its DMA ops %ps lack members to stack over\n",
			p->lower);
		return;
	}
	/* fails only while the module is on its way out */
	if (!try_module_get(THIS_MODULE))
		return;
	if (p->unclean)
		pvdma_reclaim(p);
	if (p->policy == PVDMA_POLICY_LAZY && !p->lower) {
		p->lazy = p->lazy_memory;
		pvdma_lazy_anew(p);
	}
	get_device(dev);
	set_dma_ops(dev, &p->ops);
	p->installed = true;
}

/*
 * Finds the device's tracking table and makes it visible, until the module goes:
 * devices of one domain have it in common. Returns 0, also when there is none, or an
 * errno. With pvdma_lock.
 */
static int pvdma_get_table(struct pvdma_device *p, struct device *dev)
{
	struct pvdma_table found = { 0 };
	struct pvdma_table *table;
	unsigned long irq;
	u32 status;

	p->table = found;
	if (p->policy != PVDMA_POLICY_CACHED || !(pvdma_host.features & PVDMA_FEATURE_TABLE))
		return 0;
	local_irq_save(irq);
	status = pvdma_find_table(&pvdma_host, this_cpu_ptr(p->counters), p->handle, false,
				  &found);
	local_irq_restore(irq);
	if (PVDMA_STATUS_CLASS(status)) {
		dev_err(dev, "pvdma: the host does not tell its tracking table: %s (errno %u)\n",
			pvdma_status_name(status), PVDMA_STATUS_ERRNO(status));
		return -EIO;
	}
	if (!found.pages)
		return 0;
	if (found.pages > SIZE_MAX / sizeof(u32) || !PAGE_ALIGNED(found.gpa))
		return -EPROTO;
	for (table = pvdma_tables; table < pvdma_tables + PVDMA_DEVICES_MAX; table++) {
		if (table->entries && table->gpa != found.gpa)
			continue;
		if (!table->entries) {
			found.entries = memremap(found.gpa, found.pages * sizeof(u32),
						 MEMREMAP_WB);
			if (!found.entries)
				return -ENOMEM;
			*table = found;
		}
		p->table = *table;
		return 0;
	}
	return -ENOSPC;
}

static void pvdma_put_tables(void)
{
	struct pvdma_table *table;

	for (table = pvdma_tables; table < pvdma_tables + PVDMA_DEVICES_MAX; table++) {
		if (table->entries)
			memunmap(table->entries);
	}
}

/* Takes a free slot for a device the host has. With pvdma_lock. */
static struct pvdma_device *pvdma_new(struct device *dev,
				      const struct pvdma_assignment *answer)
{
	struct pvdma_device *p;
	bool lists;

	for (p = pvdma_devices; p->dev; p++) {
		if (p == &pvdma_devices[PVDMA_DEVICES_MAX - 1])
			return NULL;
	}
	if (!p->counters) {
		p->counters = alloc_percpu(struct pvdma_counters);
		if (!p->counters)
			return NULL;
	}
	if (answer->policy == PVDMA_POLICY_LAZY && !p->lazy_memory) {
		p->lazy_memory = kvzalloc(sizeof(*p->lazy_memory), GFP_KERNEL);
		if (!p->lazy_memory)
			return NULL;
	}
	p->lower = NULL;
	p->handle = answer->handle;
	p->policy = answer->policy;
	p->identity = answer->identity;
	if (pvdma_get_table(p, dev))
		return NULL;
	p->installed = false;
	p->lost = false;
	p->removed = false;
	/* one range for a list of pages needs addresses of its own */
	lists = pvdma_host.list_entries && !answer->identity;
	p->list_entries = lists ? pvdma_host.list_entries : 1;
	/* a kernel that crashed may have been here before (kdump) */
	p->unclean = true;
	p->stale = 0;
	p->mapping_max = pvdma_mapping_max(&pvdma_host, answer);
	p->iova_last = answer->iova_bits && answer->iova_bits < 64 ?
		       (1ull << answer->iova_bits) - 1 : U64_MAX;
	xa_init_flags(&p->below, XA_FLAGS_LOCK_IRQ);
	xa_init_flags(&p->memory, XA_FLAGS_LOCK_IRQ);
	INIT_WORK(&p->settle, pvdma_settle);
	WRITE_ONCE(p->dev, dev);
	pvdma_stats_add(p);
	return p;
}

/*
 * The call that is made once per device: the assigned device, NULL if it is not,
 * or an error when there is no answer or no room for it. With pvdma_lock.
 */
static struct pvdma_device *pvdma_ask(struct device *dev)
{
	struct pci_dev *pdev = to_pci_dev(dev);
	u32 rid = (u32)pci_domain_nr(pdev->bus) << 16 | pci_dev_id(pdev);
	struct pvdma_assignment answer = { 0 };
	struct pvdma_device *p;
	unsigned long irq;
	u32 status;

	local_irq_save(irq);
	status = pvdma_is_assigned(&pvdma_host, this_cpu_ptr(&pvdma_counters), rid,
				   &answer);
	local_irq_restore(irq);
	if (PVDMA_STATUS_CLASS(status)) {
		dev_err(dev, "pvdma: the host does not say whether it is assigned: %s (errno %u)\n",
			pvdma_status_name(status), PVDMA_STATUS_ERRNO(status));
		return ERR_PTR(-EIO);
	}
	if (!answer.handle)
		return NULL;
	p = pvdma_new(dev, &answer);
	if (!p) {
		dev_err(dev, "pvdma: out of memory, no tracking table, or more than %u assigned devices\n",
			PVDMA_DEVICES_MAX);
		return ERR_PTR(-ENOMEM);
	}
	dev_info(dev, "pvdma: assigned, handle %u, policy %s, %s addresses%s\n",
		 p->handle, pvdma_policy_name(p->policy),
		 p->identity ? "identity" : "translated",
		 pvdma_needs_no_ops(p) ? ": its DMA ops are left alone" : "");
	return p;
}

/* As pvdma_ask(), which an answer makes superfluous for good. With pvdma_lock. */
static struct pvdma_device *pvdma_get(struct device *dev)
{
	unsigned long key = (unsigned long)dev;
	void *known = xa_load(&pvdma_known, key);
	struct pvdma_device *p;

	if (known)
		return xa_is_value(known) ? NULL : known;
	/* a place for the answer first: without one it would be asked for again */
	if (xa_reserve(&pvdma_known, key, GFP_KERNEL)) {
		dev_err(dev, "pvdma: out of memory\n");
		return ERR_PTR(-ENOMEM);
	}
	p = pvdma_ask(dev);
	if (IS_ERR(p))
		xa_release(&pvdma_known, key);
	else
		xa_store(&pvdma_known, key, p ?: PVDMA_NOT_OURS, GFP_KERNEL);
	return p;
}

/*
 * A device that may be assigned and cannot be served: on the direct map its driver
 * would think that all went well, while the host's IOMMU drops what the device
 * sends. So whatever the driver maps fails, and the next one is luckier.
 */
static void pvdma_refuse(struct device *dev)
{
	if (get_dma_ops(dev) || !try_module_get(THIS_MODULE)) {
		dev_err(dev, "pvdma: not served\n");
		return;
	}
	dev_err(dev, "pvdma: no DMA until a driver is bound anew\n");
	set_dma_ops(dev, &pvdma_refusing_ops);
}

static void pvdma_stop_refusing(struct device *dev)
{
	if (get_dma_ops(dev) != &pvdma_refusing_ops)
		return;
	set_dma_ops(dev, NULL);
	module_put(THIS_MODULE);
}

/* The device is gone from the bus: so is what we know of it. */
static void pvdma_forget(struct device *dev)
{
	struct pvdma_device *p = NULL;
	void *known;

	mutex_lock(&pvdma_lock);
	known = xa_erase(&pvdma_known, (unsigned long)dev);
	if (known && !xa_is_value(known))
		p = known;
	mutex_unlock(&pvdma_lock);
	if (!p)
		return;

	flush_work(&p->settle);
	mutex_lock(&pvdma_lock);
	pvdma_uninstall(p);
	if (p->installed)
		p->removed = true;
	else
		pvdma_drop(p);
	mutex_unlock(&pvdma_lock);
}

static int pvdma_notify(struct notifier_block *block, unsigned long event, void *data)
{
	struct device *dev = data;
	struct pvdma_device *p;
	void *known;

	switch (event) {
	case BUS_NOTIFY_BIND_DRIVER:
		mutex_lock(&pvdma_lock);
		pvdma_stop_refusing(dev);
		p = pvdma_get(dev);
		if (IS_ERR(p))
			pvdma_refuse(dev);
		else if (p && !pvdma_needs_no_ops(p))
			pvdma_install(p);
		mutex_unlock(&pvdma_lock);
		break;
	case BUS_NOTIFY_UNBOUND_DRIVER:
	case BUS_NOTIFY_DRIVER_NOT_BOUND:
		mutex_lock(&pvdma_lock);
		pvdma_stop_refusing(dev);
		known = xa_load(&pvdma_known, (unsigned long)dev);
		p = known && !xa_is_value(known) ? known : NULL;
		if (p && event == BUS_NOTIFY_DRIVER_NOT_BOUND && p->installed &&
		    pvdma_outstanding(p)) {
			get_device(dev);
			if (!queue_work(pvdma_queue, &p->settle))
				put_device(dev);
		} else if (p) {
			pvdma_uninstall(p);
		}
		mutex_unlock(&pvdma_lock);
		break;
	case BUS_NOTIFY_REMOVED_DEVICE:
		pvdma_forget(dev);
		break;
	}
	return NOTIFY_OK;
}

static struct notifier_block pvdma_notifier = { .notifier_call = pvdma_notify };

/* Devices whose driver was here first keep their ops: the driver has mappings. */
static void pvdma_look_at_bound(void)
{
	struct pci_dev *pdev = NULL;

	for_each_pci_dev(pdev) {
		struct device *dev = &pdev->dev;
		struct pvdma_device *p;

		device_lock(dev);
		mutex_lock(&pvdma_lock);
		if (dev->driver) {
			p = pvdma_get(dev);
			if (!IS_ERR_OR_NULL(p) && !p->installed &&
			    !pvdma_needs_no_ops(p))
				dev_warn(dev, "pvdma: not served: bound to %s before pvdma was loaded; to rebind: cd /sys/bus/pci/drivers/%s && echo %s > unbind && echo %s > bind\n",
					 dev->driver->name, dev->driver->name,
					 dev_name(dev), dev_name(dev));
		}
		mutex_unlock(&pvdma_lock);
		device_unlock(dev);
	}
}

static unsigned long pvdma_answer(struct device *dev)
{
	return 1;
}

/*
 * Does this kernel call the ops that set_dma_ops() sets? One built without support
 * for them would leave every device to the direct map, without a word.
 */
static int __init pvdma_check_kernel(void)
{
	static const struct dma_map_ops ops = { .get_merge_boundary = pvdma_answer };
	struct device *dev = kzalloc(sizeof(*dev), GFP_KERNEL);
	bool works;

	if (!dev)
		return -ENOMEM;
	set_dma_ops(dev, &ops);
	works = dma_get_merge_boundary(dev) == 1;
	kfree(dev);
	if (!works) {
		pr_err("this kernel ignores DMA ops (CONFIG_DMA_OPS or CONFIG_ARCH_HAS_DMA_OPS is off): no device could be served\n");
		return -EOPNOTSUPP;
	}
	if (cc_platform_has(CC_ATTR_GUEST_MEM_ENCRYPT)) {
		pr_err("this guest's memory is encrypted: the host cannot give it to a device\n");
		return -EOPNOTSUPP;
	}
	return 0;
}

static int __init pvdma_check_host(void)
{
	switch (pvdma_discover(&pvdma_host)) {
	case PVDMA_FOUND:
		return 0;
	case PVDMA_OTHER_MAJOR:
		pr_err("the host speaks ABI %u.%u, this module %u.%u: use the module that belongs to the host\n",
		       pvdma_host.version >> 16, pvdma_host.version & 0xffff,
		       PVDMA_ABI_MAJOR, PVDMA_ABI_MINOR);
		return -EPROTO;
	default:
		pr_err("no pvdma host here (no CPUID leaf has its signature): not loaded\n");
		return -ENODEV;
	}
}

/* Version and addresses as the host itself tells them. */
static int __init pvdma_ask_host(void)
{
	struct pvdma_iova_range *ranges;
	struct pvdma_offer offer = { 0 };
	unsigned long irq;
	u32 status, i;

	local_irq_save(irq);
	ranges = (struct pvdma_iova_range *)this_cpu_read(pvdma_call_page);
	status = pvdma_probe(&pvdma_host, this_cpu_ptr(&pvdma_counters), __pa(ranges),
			     &offer);
	if (!PVDMA_STATUS_CLASS(status)) {
		pvdma_first_iova = offer.iova_ranges ? U64_MAX : 0;
		for (i = 0; i < offer.iova_ranges; i++)
			pvdma_first_iova = min(pvdma_first_iova, ranges[i].first);
	}
	local_irq_restore(irq);
	if (PVDMA_STATUS_CLASS(status)) {
		pr_err("the host does not answer a probe: %s (errno %u)\n",
		       pvdma_status_name(status), PVDMA_STATUS_ERRNO(status));
		return -EPROTO;
	}
	return 0;
}

static void pvdma_free_call_pages(void)
{
	int cpu;

	for_each_possible_cpu(cpu)
		free_page((unsigned long)per_cpu(pvdma_call_page, cpu));
}

static int __init pvdma_get_call_pages(void)
{
	int cpu;

	BUILD_BUG_ON(PAGE_SIZE != PVDMA_CALL_PAGE_BYTES);
	BUILD_BUG_ON(sizeof(struct pvdma_entry) != PVDMA_ENTRY_BYTES);
	for_each_possible_cpu(cpu) {
		per_cpu(pvdma_call_page, cpu) = (void *)get_zeroed_page(GFP_KERNEL);
		if (!per_cpu(pvdma_call_page, cpu)) {
			pvdma_free_call_pages();
			return -ENOMEM;
		}
	}
	return 0;
}

static int __init pvdma_init(void)
{
	int err, i;

	for (i = 0; i < PVDMA_DEVICES_MAX; i++) {
		raw_spin_lock_init(&pvdma_devices[i].lazy_lock);
		INIT_DELAYED_WORK(&pvdma_devices[i].lazy_flush, pvdma_flush_late);
	}
	err = pvdma_check_host();
	if (err)
		return err;
	err = pvdma_check_kernel();
	if (err)
		return err;
	err = pvdma_get_call_pages();
	if (err)
		return err;
	err = pvdma_ask_host();
	if (err)
		goto free;
	pvdma_queue = alloc_workqueue("pvdma", WQ_UNBOUND, 0);
	if (!pvdma_queue) {
		err = -ENOMEM;
		goto free;
	}
	pvdma_stats_init();
	err = bus_register_notifier(&pci_bus_type, &pvdma_notifier);
	if (err)
		goto stats;
	pr_info("ABI %u.%u, port %#x, %u entries to a list\n",
		pvdma_host.version >> 16, pvdma_host.version & 0xffff,
		pvdma_host.port, pvdma_host.list_entries);
	pvdma_look_at_bound();
	queue_delayed_work(pvdma_queue, &pvdma_watching, 0);
	return 0;

stats:
	pvdma_stats_exit();
	destroy_workqueue(pvdma_queue);
free:
	pvdma_free_call_pages();
	return err;
}

/* No device has our ops any more, or the reference it holds would be in the way. */
static void __exit pvdma_exit(void)
{
	int i;

	bus_unregister_notifier(&pci_bus_type, &pvdma_notifier);
	cancel_delayed_work_sync(&pvdma_watching);
	destroy_workqueue(pvdma_queue);
	pvdma_stats_exit();
	pvdma_put_tables();
	for (i = 0; i < PVDMA_DEVICES_MAX; i++) {
		free_percpu(pvdma_devices[i].counters);
		kvfree(pvdma_devices[i].lazy_memory);
	}
	xa_destroy(&pvdma_known);
	pvdma_free_call_pages();
}

module_init(pvdma_init);
module_exit(pvdma_exit);

MODULE_DESCRIPTION("DMA of assigned devices, mapped at the host page by page");
MODULE_LICENSE("GPL");
MODULE_VERSION("1.2");
