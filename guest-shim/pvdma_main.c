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
#include <linux/module.h>
#include <linux/mutex.h>
#include <linux/pci.h>
#include <linux/slab.h>

#include "pvdma.h"

struct pvdma_host pvdma_host;
u64 pvdma_first_iova;
struct pvdma_device pvdma_devices[PVDMA_DEVICES_MAX];
DEFINE_PER_CPU(struct pvdma_entry *, pvdma_call_page);
DEFINE_PER_CPU(struct pvdma_counters, pvdma_counters);

/*
 * Every device the host was asked about, by its address: an entry of
 * pvdma_devices, or PVDMA_NOT_OURS. So no device is asked about twice.
 */
static DEFINE_XARRAY(pvdma_known);
#define PVDMA_NOT_OURS	xa_mk_value(0)
static DEFINE_MUTEX(pvdma_lock);

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

/* Takes the ops out again. Called with pvdma_lock. */
static void pvdma_uninstall(struct pvdma_device *p)
{
	s64 left = pvdma_outstanding(p);

	if (!p->installed)
		return;
	if (get_dma_ops(p->dev) != &p->ops) {
		dev_warn(p->dev, "pvdma: other DMA ops lie over ours, which stay: remove those first\n");
		return;
	}
	if (left)
		dev_warn(p->dev, "pvdma: the driver left %lld mappings (%llu bytes) behind; the host keeps them\n",
			 left, pvdma_outstanding_bytes(p));
	set_dma_ops(p->dev, p->lower);
	p->installed = false;
	module_put(THIS_MODULE);
}

/*
 * A probe that failed: what the driver took by devres is given back only after
 * the notification, and has to go back the way it came. So wait for the device's
 * lock and look again.
 */
static void pvdma_settle(struct work_struct *work)
{
	struct pvdma_device *p = container_of(work, struct pvdma_device, settle);
	struct device *dev = p->dev;

	device_lock(dev);
	if (!dev->driver) {
		mutex_lock(&pvdma_lock);
		pvdma_uninstall(p);
		mutex_unlock(&pvdma_lock);
	}
	device_unlock(dev);
	put_device(dev);
}

/* Puts our ops over the device's, before its driver probes. With pvdma_lock. */
static void pvdma_install(struct pvdma_device *p)
{
	struct device *dev = p->dev;

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
	set_dma_ops(dev, &p->ops);
	p->installed = true;
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
	p->lower = NULL;
	p->handle = answer->handle;
	p->policy = answer->policy;
	p->identity = answer->identity;
	p->installed = false;
	/* one range for a list of pages needs addresses of its own */
	lists = pvdma_host.list_entries && !answer->identity;
	p->list_entries = lists ? pvdma_host.list_entries : 1;
	p->iova_last = answer->iova_bits && answer->iova_bits < 64 ?
		       (1ull << answer->iova_bits) - 1 : U64_MAX;
	xa_init_flags(&p->below, XA_FLAGS_LOCK_IRQ);
	INIT_WORK(&p->settle, pvdma_settle);
	WRITE_ONCE(p->dev, dev);
	pvdma_stats_add(p);
	return p;
}

/* The call that is made once per device. With pvdma_lock. */
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
		dev_err(dev, "pvdma: not served: the host does not say whether it is assigned: %s (errno %u)\n",
			pvdma_status_name(status), PVDMA_STATUS_ERRNO(status));
		return NULL;
	}
	if (!answer.handle)
		return NULL;
	p = pvdma_new(dev, &answer);
	if (!p) {
		dev_err(dev, "pvdma: not served: out of memory, or more than %u assigned devices\n",
			PVDMA_DEVICES_MAX);
		return NULL;
	}
	dev_info(dev, "pvdma: assigned, handle %u, policy %s, %s addresses%s\n",
		 p->handle, pvdma_policy_name(p->policy),
		 p->identity ? "identity" : "translated",
		 pvdma_needs_no_ops(p) ? ": its DMA ops are left alone" : "");
	return p;
}

/* The assigned device, or NULL. Asks the host the first time. With pvdma_lock. */
static struct pvdma_device *pvdma_get(struct device *dev)
{
	unsigned long key = (unsigned long)dev;
	void *known = xa_load(&pvdma_known, key);
	struct pvdma_device *p;

	if (known)
		return xa_is_value(known) ? NULL : known;
	/* a place for the answer first: without one it would be asked for again */
	if (xa_reserve(&pvdma_known, key, GFP_KERNEL)) {
		dev_err(dev, "pvdma: not served: out of memory\n");
		return NULL;
	}
	p = pvdma_ask(dev);
	xa_store(&pvdma_known, key, p ?: PVDMA_NOT_OURS, GFP_KERNEL);
	return p;
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
	pvdma_stats_remove(p);
	xa_destroy(&p->below);
	WRITE_ONCE(p->dev, NULL);
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
		p = pvdma_get(dev);
		if (p && !pvdma_needs_no_ops(p))
			pvdma_install(p);
		mutex_unlock(&pvdma_lock);
		break;
	case BUS_NOTIFY_UNBOUND_DRIVER:
	case BUS_NOTIFY_DRIVER_NOT_BOUND:
		mutex_lock(&pvdma_lock);
		known = xa_load(&pvdma_known, (unsigned long)dev);
		p = known && !xa_is_value(known) ? known : NULL;
		if (p && event == BUS_NOTIFY_DRIVER_NOT_BOUND && p->installed &&
		    pvdma_outstanding(p)) {
			get_device(dev);
			if (!schedule_work(&p->settle))
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
			if (p && !p->installed && !pvdma_needs_no_ops(p))
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
	int err;

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
	pvdma_stats_init();
	err = bus_register_notifier(&pci_bus_type, &pvdma_notifier);
	if (err)
		goto stats;
	pr_info("ABI %u.%u, port %#x, %u entries to a list\n",
		pvdma_host.version >> 16, pvdma_host.version & 0xffff,
		pvdma_host.port, pvdma_host.list_entries);
	pvdma_look_at_bound();
	return 0;

stats:
	pvdma_stats_exit();
free:
	pvdma_free_call_pages();
	return err;
}

/* No device has our ops any more, or the reference it holds would be in the way. */
static void __exit pvdma_exit(void)
{
	int i;

	bus_unregister_notifier(&pci_bus_type, &pvdma_notifier);
	for (i = 0; i < PVDMA_DEVICES_MAX; i++) {
		if (pvdma_devices[i].dev)
			flush_work(&pvdma_devices[i].settle);
	}
	pvdma_stats_exit();
	for (i = 0; i < PVDMA_DEVICES_MAX; i++) {
		if (pvdma_devices[i].dev)
			xa_destroy(&pvdma_devices[i].below);
		free_percpu(pvdma_devices[i].counters);
	}
	xa_destroy(&pvdma_known);
	pvdma_free_call_pages();
}

module_init(pvdma_init);
module_exit(pvdma_exit);

MODULE_DESCRIPTION("DMA of assigned devices, mapped at the host page by page");
MODULE_LICENSE("GPL");
MODULE_VERSION(__stringify(1.0));
