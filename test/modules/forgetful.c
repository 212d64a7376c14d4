// SPDX-License-Identifier: GPL-2.0
/*
 * Test module: a driver for any PCI device (by driver_override) that maps memory
 * of every kind and forgets it all when it is unbound, but for what devres gives
 * back. Only when it is unloaded it remembers: far too late it gives the coherent
 * buffers back. It never touches the device. Its parameters count until the next bind.
 */
#include <linux/dma-mapping.h>
#include <linux/module.h>
#include <linux/pci.h>
#include <linux/scatterlist.h>
#include <linux/slab.h>

static unsigned int pages = 5;
module_param(pages, uint, 0644);
MODULE_PARM_DESC(pages, "pages to map, one by one");
static unsigned int entries = 300;
module_param(entries, uint, 0644);
MODULE_PARM_DESC(entries, "pages to map as one list");
static unsigned int neighbours;
module_param(neighbours, uint, 0644);
MODULE_PARM_DESC(neighbours, "pages before those in the list, one after the other (a power of two)");
static unsigned int buffers = 2;
module_param(buffers, uint, 0644);
MODULE_PARM_DESC(buffers, "coherent buffers of two pages");
static bool fail;
module_param(fail, bool, 0644);
MODULE_PARM_DESC(fail, "the probe fails when everything is mapped");
static bool wrong;
module_param(wrong, bool, 0644);
MODULE_PARM_DESC(wrong, "a mapping is unmapped with a wrong length, then twice");

/* What was forgotten is freed with the module: until then a device may reach it. */
static LIST_HEAD(forgotten);

/* Likewise, and given back by the DMA API. */
struct buffer {
	struct list_head list;
	struct device *dev;
	void *memory;
	dma_addr_t address;
};

static LIST_HEAD(forgotten_buffers);

static int get_buffer_to_forget(struct device *dev)
{
	struct buffer *buffer = kzalloc(sizeof(*buffer), GFP_KERNEL);

	if (!buffer)
		return -ENOMEM;
	buffer->memory = dma_alloc_coherent(dev, 2 * PAGE_SIZE, &buffer->address, GFP_KERNEL);
	if (!buffer->memory) {
		kfree(buffer);
		return -ENOMEM;
	}
	buffer->dev = get_device(dev);
	list_add(&buffer->list, &forgotten_buffers);
	return 0;
}

static struct page *get_page_to_forget(void)
{
	struct page *page = alloc_page(GFP_KERNEL | __GFP_ZERO);

	if (page)
		list_add(&page->lru, &forgotten);
	return page;
}

static int map_pages(struct device *dev)
{
	unsigned int i;

	for (i = 0; i < pages; i++) {
		struct page *page = get_page_to_forget();

		if (!page || dma_mapping_error(dev, dma_map_page(dev, page, 0, PAGE_SIZE,
								 DMA_FROM_DEVICE)))
			return -ENOMEM;
	}
	return 0;
}

/* The list's i-th page. */
static struct page *list_page(struct page *block, int i)
{
	if (i < neighbours) {
		list_add(&block[i].lru, &forgotten);
		return block + i;
	}
	/* every other page, so that no two are neighbours */
	return get_page_to_forget() ? get_page_to_forget() : NULL;
}

static int map_list(struct device *dev)
{
	struct page *block = NULL;
	struct scatterlist *sg;
	struct sg_table table;
	int i, err;

	if (!entries)
		return 0;
	if (neighbours) {
		block = alloc_pages(GFP_KERNEL | __GFP_ZERO, ilog2(neighbours));
		if (!block)
			return -ENOMEM;
		split_page(block, ilog2(neighbours));
	}
	err = sg_alloc_table(&table, neighbours + entries, GFP_KERNEL);
	if (err)
		return err;
	for_each_sgtable_sg(&table, sg, i) {
		struct page *page = list_page(block, i);

		if (!page)
			err = -ENOMEM;
		else
			sg_set_page(sg, page, PAGE_SIZE, 0);
	}
	if (!err)
		err = dma_map_sgtable(dev, &table, DMA_TO_DEVICE, 0);
	sg_free_table(&table);
	return err;
}

static int do_wrong(struct device *dev)
{
	struct page *page = get_page_to_forget();
	dma_addr_t address;

	if (!page)
		return -ENOMEM;
	address = dma_map_page(dev, page, 0, PAGE_SIZE, DMA_TO_DEVICE);
	if (dma_mapping_error(dev, address))
		return -ENOMEM;
	dma_unmap_page(dev, address, 2 * PAGE_SIZE, DMA_TO_DEVICE);
	dma_unmap_page(dev, address, PAGE_SIZE, DMA_TO_DEVICE);
	dma_unmap_page(dev, address, PAGE_SIZE, DMA_TO_DEVICE);
	return 0;
}

static int forgetful_probe(struct pci_dev *pdev, const struct pci_device_id *id)
{
	struct device *dev = &pdev->dev;
	dma_addr_t address;
	unsigned int i;
	int err;

	err = pci_enable_device(pdev);
	if (err)
		return err;
	err = dma_set_mask_and_coherent(dev, DMA_BIT_MASK(64));
	if (err)
		goto disable;
	pci_set_master(pdev);
	err = -ENOMEM;
	if (!dmam_alloc_coherent(dev, PAGE_SIZE, &address, GFP_KERNEL))
		goto disable;
	for (i = 0; i < buffers; i++) {
		if (get_buffer_to_forget(dev))
			goto disable;
	}
	err = map_pages(dev) ?: map_list(dev);
	if (!err && wrong)
		err = do_wrong(dev);
	if (!err && fail)
		err = -ENODEV;
	if (!err)
		return 0;
disable:
	pci_disable_device(pdev);
	return err;
}

/* Forgets to stop the device as well. */
static void forgetful_remove(struct pci_dev *pdev)
{
}

static struct pci_driver forgetful_driver = {
	.name = "forgetful",
	.id_table = NULL,
	.probe = forgetful_probe,
	.remove = forgetful_remove,
};

static int __init forgetful_init(void)
{
	return pci_register_driver(&forgetful_driver);
}

static void __exit forgetful_exit(void)
{
	struct buffer *buffer, *next_buffer;
	struct page *page, *next;

	pci_unregister_driver(&forgetful_driver);
	list_for_each_entry_safe(buffer, next_buffer, &forgotten_buffers, list) {
		dma_free_coherent(buffer->dev, 2 * PAGE_SIZE, buffer->memory, buffer->address);
		put_device(buffer->dev);
		kfree(buffer);
	}
	list_for_each_entry_safe(page, next, &forgotten, lru)
		__free_page(page);
}

module_init(forgetful_init);
module_exit(forgetful_exit);
MODULE_DESCRIPTION("Maps memory for a device and forgets it");
MODULE_LICENSE("GPL");
