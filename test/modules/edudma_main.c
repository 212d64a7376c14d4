// SPDX-License-Identifier: GPL-2.0
/*
 * edudma.ko: a driver for QEMU's edu (PCI 1234:11e8), a device with a DMA engine, that
 * tests the kernel's DMA API: it calls every operation of dma_map_ops and has the device
 * move bytes by the addresses it gets. It relies on the documented registers only, so that
 * it runs on any device that has them.
 *
 * Writing the name of a check or of a group of them to /dev/edudma-<bdf> runs it (the
 * writer has to open it for reading as well: one check maps it into the writer's memory);
 * reading then gives a line for each: `NAME ok' or `NAME FAILED reason'. Only a test uses
 * it: whoever unbinds the device has closed the file before.
 */
#include <linux/interrupt.h>
#include <linux/module.h>
#include <linux/slab.h>
#include <linux/uaccess.h>

#include "edudma.h"

/* Transfers take 100 ms in the device; what runs the device may be busy. */
#define PATIENCE	(30 * HZ)
#define RESULTS_BYTES	(16 * 1024)

bool want(struct edu *e, bool fine, const char *format, ...)
{
	va_list args;

	if (!fine && !e->why[0]) {
		va_start(args, format);
		vscnprintf(e->why, sizeof(e->why), format, args);
		va_end(args);
	}
	return fine;
}

static irqreturn_t edu_irq(int irq, void *data)
{
	struct edu *e = data;
	u32 status = readl(e->regs + EDU_IRQ_STATUS);

	if (!status)
		return IRQ_NONE;
	writel(status, e->regs + EDU_IRQ_ACK);
	atomic_or(status, &e->raised);
	wake_up(&e->wait);
	return IRQ_HANDLED;
}

bool edu_wait_irq(struct edu *e, u32 bits)
{
	long left = wait_event_timeout(e->wait, (atomic_read(&e->raised) & bits) == bits, PATIENCE);

	atomic_andnot(bits, &e->raised);
	return want(e, left, "no interrupt %#x in %u s", bits, PATIENCE / HZ);
}

static bool edu_transfer(struct edu *e, u64 src, u64 dst, u32 bytes, u64 command)
{
	if (!want(e, bytes >= 1 && bytes <= EDU_MOVE_MAX,
		  "a transfer of %u bytes is not for this device", bytes))
		return false;
	writeq(src, e->regs + EDU_DMA_SRC);
	writeq(dst, e->regs + EDU_DMA_DST);
	writeq(bytes, e->regs + EDU_DMA_COUNT);
	writeq(command | EDU_DMA_RUN | EDU_DMA_WITH_IRQ, e->regs + EDU_DMA_COMMAND);
	return edu_wait_irq(e, EDU_IRQ_DMA) &&
	       want(e, !(readq(e->regs + EDU_DMA_COMMAND) & EDU_DMA_RUN),
		    "a transfer goes on after its interrupt");
}

bool edu_fetch(struct edu *e, dma_addr_t at, u32 bytes)
{
	return edu_transfer(e, at, EDU_BUFFER, bytes, 0);
}

bool edu_store(struct edu *e, dma_addr_t at, u32 bytes)
{
	return edu_transfer(e, EDU_BUFFER, at, bytes, EDU_DMA_TO_RAM);
}

static u32 run_checks(struct edu *e, const struct check *check, const char *word)
{
	u32 n = 0;

	for (; check->name; check++) {
		if (strcmp(word, check->group) && strcmp(word, check->name))
			continue;
		n++;
		e->why[0] = '\0';
		check->run(e, check->arg);
		e->results_bytes +=
			scnprintf(e->results + e->results_bytes, RESULTS_BYTES - e->results_bytes,
				  e->why[0] ? "%s FAILED %s\n" : "%s ok\n", check->name, e->why);
	}
	return n;
}

static struct edu *edu_of(struct file *file)
{
	return container_of(file->private_data, struct edu, misc);
}

static ssize_t edu_write(struct file *file, const char __user *from, size_t bytes, loff_t *pos)
{
	struct edu *e = edu_of(file);
	char word[40];
	u32 n;

	if (bytes >= sizeof(word))
		return -EINVAL;
	if (copy_from_user(word, from, bytes))
		return -EFAULT;
	word[bytes] = '\0';
	strim(word);
	if (mutex_lock_interruptible(&e->lock))
		return -EINTR;
	e->file = file;
	e->results_bytes = 0;
	n = run_checks(e, good_checks, word) + run_checks(e, bad_checks, word);
	e->file = NULL;
	mutex_unlock(&e->lock);
	return n ? bytes : -ENOENT;
}

static ssize_t edu_read(struct file *file, char __user *to, size_t bytes, loff_t *pos)
{
	struct edu *e = edu_of(file);
	ssize_t ret;

	if (mutex_lock_interruptible(&e->lock))
		return -EINTR;
	ret = simple_read_from_buffer(to, bytes, pos, e->results, e->results_bytes);
	mutex_unlock(&e->lock);
	return ret;
}

/* Without the lock: the run that holds it is the caller. */
static int edu_mmap(struct file *file, struct vm_area_struct *vma)
{
	struct edu *e = edu_of(file);

	if (!e->shared || e->file != file)
		return -ENODEV;
	return dma_mmap_coherent(e->dev, vma, e->shared, e->shared_at, e->shared_bytes);
}

static const struct file_operations edu_fops = {
	.owner = THIS_MODULE,
	.read = edu_read,
	.write = edu_write,
	.mmap = edu_mmap,
	.llseek = default_llseek,
};

static int edu_probe(struct pci_dev *pdev, const struct pci_device_id *id)
{
	struct device *dev = &pdev->dev;
	struct edu *e;
	int err;

	e = devm_kzalloc(dev, sizeof(*e), GFP_KERNEL);
	if (!e)
		return -ENOMEM;
	e->results = devm_kzalloc(dev, RESULTS_BYTES, GFP_KERNEL);
	e->misc.name = devm_kasprintf(dev, GFP_KERNEL, "edudma-%s", pci_name(pdev));
	if (!e->results || !e->misc.name)
		return -ENOMEM;
	e->pdev = pdev;
	e->dev = dev;
	init_waitqueue_head(&e->wait);
	mutex_init(&e->lock);
	pci_set_drvdata(pdev, e);

	err = pcim_enable_device(pdev);
	if (err)
		return err;
	err = pcim_iomap_regions(pdev, BIT(0), "edudma");
	if (err)
		return err;
	e->regs = pcim_iomap_table(pdev)[0];
	if ((readl(e->regs + EDU_IDENTITY) & 0xffff) != 0x00ed)
		return dev_err_probe(dev, -ENODEV, "the identity %#x is not edu's\n",
				     readl(e->regs + EDU_IDENTITY));

	err = dma_set_mask_and_coherent(dev, DMA_BIT_MASK(EDU_BITS));
	if (err)
		return err;
	pci_set_master(pdev);
	err = pci_alloc_irq_vectors(pdev, 1, 1, PCI_IRQ_ALL_TYPES);
	if (err < 0)
		goto off;
	err = request_irq(pci_irq_vector(pdev, 0), edu_irq, IRQF_SHARED, "edudma", e);
	if (err)
		goto vectors;

	err = -ENOMEM;
	e->in = dma_alloc_coherent(dev, PAGE_SIZE, &e->in_at, GFP_KERNEL);
	if (!e->in)
		goto irq;
	e->out = dma_alloc_coherent(dev, PAGE_SIZE, &e->out_at, GFP_KERNEL);
	if (!e->out)
		goto in;

	e->misc.minor = MISC_DYNAMIC_MINOR;
	e->misc.parent = dev;
	e->misc.fops = &edu_fops;
	err = misc_register(&e->misc);
	if (!err)
		return 0;

	dma_free_coherent(dev, PAGE_SIZE, e->out, e->out_at);
in:
	dma_free_coherent(dev, PAGE_SIZE, e->in, e->in_at);
irq:
	free_irq(pci_irq_vector(pdev, 0), e);
vectors:
	pci_free_irq_vectors(pdev);
off:
	pci_clear_master(pdev);
	return err;
}

static void edu_remove(struct pci_dev *pdev)
{
	struct edu *e = pci_get_drvdata(pdev);

	misc_deregister(&e->misc);
	pci_clear_master(pdev);
	dma_free_coherent(e->dev, PAGE_SIZE, e->out, e->out_at);
	dma_free_coherent(e->dev, PAGE_SIZE, e->in, e->in_at);
	free_irq(pci_irq_vector(pdev, 0), e);
	pci_free_irq_vectors(pdev);
}

static const struct pci_device_id edu_ids[] = {
	{ PCI_DEVICE(0x1234, 0x11e8) },
	{ }
};
MODULE_DEVICE_TABLE(pci, edu_ids);

static struct pci_driver edu_driver = {
	.name = "edudma",
	.id_table = edu_ids,
	.probe = edu_probe,
	.remove = edu_remove,
};
module_pci_driver(edu_driver);

MODULE_DESCRIPTION("Tests the DMA API with QEMU's edu device");
MODULE_LICENSE("GPL");
