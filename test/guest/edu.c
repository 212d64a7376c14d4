/* SPDX-License-Identifier: MIT */
/*
 * Drives an edu, QEMU's assigned one or the emulated one, through all it can do
 * and all that it must not reach, and prints a line per fact:
 *
 *   fact NAME VALUE
 *
 * What is right is the test's to say (emulated.test.ts): the same for both. Needs
 * RAM beyond 288 MiB. With `bounds' on the command line also what ends QEMU.
 *
 * With `lose' it has the device compute, waits until it is gone, and looks what
 * is left of it, and again after a reset that a byte on COM1 asks for; with
 * `busy' it has it copy and compute until somebody ends it.
 */
#include "edu.h"

#define PAGE		4096u
/* Pages of known content, of which few are mapped. */
#define ARENA_PAGES	24u
#define MAPPED		2u
/* RAM that no address of 28 bits reaches. */
#define HIGH		0x12000000ull
#define SCATTERED	8u
#define WAIT_LOOPS	20000000u

#define PCI_CLASS	0x08
#define PCI_SUBSYSTEM	0x2c
#define PCI_CAPABILITIES 0x34
#define PCI_CAP_MSI	0x05
#define MSI_ENABLE	(1u << 16)

#define LAPIC_SPURIOUS	(LAPIC + 0xf0)
#define LAPIC_ENABLED	0x100
#define LAPIC_REQUESTED	(LAPIC + 0x200)

static u8 arena[ARENA_PAGES][PAGE] __attribute__((aligned(4096)));
static u8 bounce[PAGE] __attribute__((aligned(4096)));
/* What memory is filled with: a seed is where in it to begin, in words. */
static u64 content[2 * PAGE / 8];
#define SEEDS		(PAGE / 8)
static struct pvdma_entry call_page[PVDMA_LIST_ENTRIES] __attribute__((aligned(4096)));
static struct pvdma_counters counters;
static struct pvdma_host host;
static struct pvdma_assignment device;
static u32 slot;
static u64 edu;
static u64 bounce_iova;

static void fact(const char *name, u64 value)
{
	print("fact %s 0x%lx\n", name, (unsigned long)value);
}

/* --- registers ------------------------------------------------------------ */

static void write64(u64 gpa, u64 value)
{
	*(volatile u64 *)gpa = value;
}

static u64 read64(u64 gpa)
{
	return *(volatile u64 *)gpa;
}

static bool find_edu(void)
{
	slot = edu_find(&host, &counters, &device);
	if (slot)
		edu = edu_enable(slot);
	return slot;
}

/* Waits until bits of a register are as wanted; false when they are not for long. */
static bool wait_for(u32 offset, u32 bits, u32 wanted)
{
	u32 loops;

	for (loops = 0; loops < WAIT_LOOPS; loops++)
		if ((read32(edu + offset) & bits) == wanted)
			return true;
	return false;
}

static void config_facts(void)
{
	u32 bar = pci_read(slot, 0, PCI_BAR0);
	u32 at, words = 0;

	fact("id", pci_read(slot, 0, 0));
	fact("class", pci_read(slot, 0, PCI_CLASS));
	fact("subsystem", pci_read(slot, 0, PCI_SUBSYSTEM));
	pci_write(slot, 0, PCI_BAR0, ~0u);
	fact("bar-size", pci_read(slot, 0, PCI_BAR0));
	fact("bar-elsewhere", read32(edu + EDU_IDENTITY));
	pci_write(slot, 0, PCI_BAR0, bar);
	/* Moved by 1 MiB, and back. */
	pci_write(slot, 0, PCI_BAR0, bar + 0x100000);
	fact("bar-moved", read32(edu + 0x100000 + EDU_IDENTITY));
	fact("bar-left", read32(edu + EDU_IDENTITY));
	pci_write(slot, 0, PCI_BAR0, bar);
	pci_write(slot, 0, PCI_COMMAND, PCI_MASTER);
	fact("bar-off", read32(edu + EDU_IDENTITY));
	pci_write(slot, 0, PCI_COMMAND, PCI_MEMORY | PCI_MASTER);
	for (at = pci_read(slot, 0, PCI_CAPABILITIES) & 0xfc; at && words++ < 48;) {
		u32 word = pci_read(slot, 0, at);

		if ((word & 0xff) == PCI_CAP_MSI)
			fact("msi-vectors-log2", word >> 17 & 7);
		at = word >> 8 & 0xfc;
	}
}

static void register_facts(void)
{
	static const u32 numbers[] = { 0, 1, 5, 12, 13, 20, 40 };
	u32 i;

	fact("identity", read32(edu + EDU_IDENTITY));
	write32(edu + EDU_IDENTITY, 0x11223344);
	fact("identity-written", read32(edu + EDU_IDENTITY));
	write32(edu + EDU_LIVENESS, 0);
	fact("liveness-0", read32(edu + EDU_LIVENESS));
	write32(edu + EDU_LIVENESS, 0x12345678);
	fact("liveness", read32(edu + EDU_LIVENESS));
	for (i = 0; i < sizeof(numbers) / sizeof(numbers[0]); i++) {
		write32(edu + EDU_FACTORIAL, numbers[i]);
		fact("factorial-done", wait_for(EDU_STATUS, EDU_COMPUTING, 0));
		print("fact factorial-%u 0x%x\n", numbers[i], read32(edu + EDU_FACTORIAL));
	}
	write32(edu + EDU_STATUS, ~0u);
	fact("status-all", read32(edu + EDU_STATUS));
	write32(edu + EDU_STATUS, 0);
	fact("status-none", read32(edu + EDU_STATUS));
	fact("unknown", read32(edu + 0x0c));
	fact("write-only", read32(edu + EDU_IRQ_RAISE));
	fact("far", read32(edu + 0xffffc));
	write32(edu + EDU_SOURCE, 0x11223344);
	write64(edu + EDU_TARGET, 0x0000000512345678ull);
	write64(edu + EDU_BYTES, 100);
	fact("source", read64(edu + EDU_SOURCE));
	fact("target", read64(edu + EDU_TARGET));
	fact("target-low", read32(edu + EDU_TARGET));
	write32(edu + EDU_TARGET, 0x87654321);
	fact("target-4-of-8", read64(edu + EDU_TARGET));
	fact("count", read64(edu + EDU_BYTES));
	write32(edu + EDU_COMMAND, EDU_TO_MEMORY);
	fact("command-without-run", read64(edu + EDU_COMMAND));
}

/* --- interrupts ----------------------------------------------------------- */

/* Interrupts stay off: one that came is requested of the local APIC for good. */
static u32 vector = 0x40;

static bool requested(u32 which)
{
	return read32(LAPIC_REQUESTED + which / 32 * 0x10) >> which % 32 & 1;
}

/* Gives the device's message a vector that was not used yet. */
static void next_vector(u32 msi, bool enable)
{
	vector++;
	pci_write(slot, 0, msi + 4, 0xfee00000);
	pci_write(slot, 0, msi + 8, 0);
	pci_write(slot, 0, msi + 12, vector);
	pci_write(slot, 0, msi, enable ? MSI_ENABLE : 0);
}

static bool came(void)
{
	u32 loops;

	for (loops = 0; loops < WAIT_LOOPS / 10; loops++)
		if (requested(vector))
			return true;
	return false;
}

static void interrupt_facts(void)
{
	u32 msi, masked;

	for (msi = pci_read(slot, 0, PCI_CAPABILITIES) & 0xfc; msi;) {
		u32 word = pci_read(slot, 0, msi);

		if ((word & 0xff) == PCI_CAP_MSI)
			break;
		msi = word >> 8 & 0xfc;
	}
	if (!msi)
		return;
	write32(LAPIC_SPURIOUS, LAPIC_ENABLED | 0xff);

	next_vector(msi, true);
	write32(edu + EDU_IRQ_RAISE, 0x5);
	fact("raised-came", came());
	fact("raised-status", read32(edu + EDU_IRQ_STATUS));
	write32(edu + EDU_IRQ_ACK, 0x1);
	fact("acknowledged-1", read32(edu + EDU_IRQ_STATUS));
	write32(edu + EDU_IRQ_ACK, ~0u);
	fact("acknowledged-all", read32(edu + EDU_IRQ_STATUS));

	next_vector(msi, true);
	write32(edu + EDU_STATUS, EDU_STATUS_IRQ);
	write32(edu + EDU_FACTORIAL, 6);
	fact("factorial-irq", wait_for(EDU_IRQ_STATUS, ~0u, 1));
	fact("factorial-came", came());
	write32(edu + EDU_IRQ_ACK, 1);
	write32(edu + EDU_STATUS, 0);

	/* Off: lost. On again with another vector: the next one comes, the lost one does not. */
	next_vector(msi, false);
	masked = vector;
	write32(edu + EDU_IRQ_RAISE, 0x8);
	fact("off-status", read32(edu + EDU_IRQ_STATUS));
	write32(edu + EDU_IRQ_ACK, 0x8);
	next_vector(msi, true);
	write32(edu + EDU_IRQ_RAISE, 0x10);
	fact("on-came", came());
	fact("off-came", requested(masked));
	write32(edu + EDU_IRQ_ACK, 0x10);

	next_vector(msi, true);
	edu_copy(edu, bounce_iova, EDU_BUFFER, 16, EDU_IRQ);
	fact("dma-irq", wait_for(EDU_IRQ_STATUS, ~0u, 0x100));
	fact("dma-came", came());
	fact("dma-command", read32(edu + EDU_COMMAND));
	write32(edu + EDU_IRQ_ACK, 0x100);
	fact("dma-acknowledged", read32(edu + EDU_IRQ_STATUS));
	pci_write(slot, 0, msi, 0);
}

/* --- DMA ------------------------------------------------------------------ */

/* Some hosts emulate every instruction of ours; string instructions cost the least. */
static void copy(void *to, const void *from, u64 bytes)
{
	u64 words = bytes / 8;

	bytes %= 8;
	asm volatile("rep movsq; movq %3, %2; rep movsb"
		     : "+D" (to), "+S" (from), "+c" (words) : "r" (bytes) : "memory");
}

/* Bytes that differ. */
static u32 differ(const void *a, const void *b, u64 bytes)
{
	const u8 *x = a, *y = b;
	u64 words = bytes / 8;
	bool same;
	u32 count = 0;

	asm volatile("cmp %%rax, %%rax; repe cmpsq" : "+D" (a), "+S" (b), "+c" (words), "=@cce" (same)
		     : : "memory");
	if (same)
		bytes %= 8, x = a, y = b;
	while (bytes--)
		count += *x++ != *y++;
	return count;
}

static void make_content(void)
{
	u64 word = 0x9e3779b97f4a7c15ull;
	u32 i;

	for (i = 0; i < sizeof(content) / sizeof(content[0]); i++)
		content[i] = word = word * 6364136223846793005ull + 1442695040888963407ull;
}

static void fill(void *memory, u32 bytes, u32 seed)
{
	copy(memory, content + seed % SEEDS, bytes);
}

/* Bytes that are not as fill() left them. */
static u32 changed(const void *memory, u32 bytes, u32 seed)
{
	return differ(memory, content + seed % SEEDS, bytes);
}

static u64 map(u64 gpa, u64 bytes, u32 flags)
{
	u64 iova;
	u32 status = pvdma_map(&host, &counters, device.handle, gpa, bytes, EDU_IOVA_MAX, flags, &iova);

	if (status)
		print("guest: map %s %u\n", pvdma_status_name(status), PVDMA_STATUS_ERRNO(status));
	return status ? 0 : iova;
}

static u32 unmap(u64 iova, u64 bytes)
{
	return pvdma_unmap(&host, &counters, device.handle, iova, bytes);
}

static void fetch(u64 iova, u32 bytes)
{
	edu_fetch(edu, iova, bytes);
	wait_for(EDU_COMMAND, EDU_RUN, 0);
}

static void store(u64 iova, u32 bytes)
{
	edu_store(edu, iova, bytes);
	wait_for(EDU_COMMAND, EDU_RUN, 0);
}

/* Fills the device's buffer with the content of the bounce page. */
static void load(u32 seed)
{
	fill(bounce, PAGE, seed);
	fetch(bounce_iova, PAGE);
}

static u32 seed = 100;

/* Memory into the device and, elsewhere, out again: bytes that are wrong. */
static u32 there_and_back(u8 *memory, u64 iova, u32 from, u32 to, u32 bytes)
{
	fill(memory + from, bytes, ++seed);
	fill(memory + to, bytes, seed + 7);
	fetch(iova + from, bytes);
	store(iova + to, bytes);
	return differ(memory + from, memory + to, bytes);
}

static void dma_facts(void)
{
	u8 *high = (u8 *)HIGH;
	struct pvdma_list list;
	u64 iova;
	u32 i, wrong;

	fact("dma-wrong", there_and_back(bounce, bounce_iova, 0, 2048, 16));
	fact("dma-odd-wrong", there_and_back(bounce, bounce_iova, 3, 1001, 333));

	iova = map((u64)arena[MAPPED], 2 * PAGE, PVDMA_MAP_READ | PVDMA_MAP_WRITE);
	fact("dma-crossing-wrong", there_and_back(arena[MAPPED], iova, 100, 4000, 3000));
	/* The low address, and the one above the mask that is cut to it. */
	edu_copy(edu, iova + 100, EDU_BUFFER, 16, 0);
	wait_for(EDU_COMMAND, EDU_RUN, 0);
	write64(edu + EDU_SOURCE, EDU_BUFFER);
	write64(edu + EDU_TARGET, 0x300000000ull + 5 * (EDU_IOVA_MAX + 1) + iova + 200);
	write32(edu + EDU_BYTES, 16);
	write32(edu + EDU_COMMAND, EDU_RUN | EDU_TO_MEMORY);
	wait_for(EDU_COMMAND, EDU_RUN, 0);
	fact("dma-masked-wrong", differ(arena[MAPPED] + 100, arena[MAPPED] + 200, 16));
	fact("dma-unmap", unmap(iova, 2 * PAGE));

	/* Above the mask: placed below it. */
	iova = map(HIGH, 2 * PAGE, PVDMA_MAP_READ | PVDMA_MAP_WRITE);
	fact("high-below-mask", iova && iova + 2 * PAGE - 1 <= EDU_IOVA_MAX);
	fact("high-gpa-above-mask", HIGH > EDU_IOVA_MAX);
	fact("high-wrong", there_and_back(high, iova, 2000, 5001, 3001));
	fact("high-unmap", unmap(iova, 2 * PAGE));

	/* Pages in any order as one range: a part of each. */
	pvdma_list_start(&list, call_page, host.list_entries, host.map_pages, ~0ull);
	for (i = 0; i < SCATTERED; i++)
		pvdma_list_add(&list, (u64)arena[(i * 5 + 3) % SCATTERED * 2 + 8], PAGE);
	fact("list-map", pvdma_map_list(&host, &counters, device.handle, &list, (u64)call_page,
					EDU_IOVA_MAX, PVDMA_MAP_READ | PVDMA_MAP_WRITE, &iova));
	wrong = 0;
	for (i = 0; i < SCATTERED; i++) {
		u8 *page = arena[(i * 5 + 3) % SCATTERED * 2 + 8];

		fill(page, PAGE, ++seed);
		load(seed + 50);
		store(iova + i * PAGE + 64, 256);
		wrong += differ(page + 64, bounce, 256) + changed(page, 64, seed) +
			 changed(page + 320, PAGE - 320, seed + 320 / 8);
	}
	/* Over the end of a page into the next of the list. */
	load(seed + 51);
	store(iova + PAGE - 100, 300);
	wrong += differ(arena[3 * 2 + 8] + PAGE - 100, bounce, 100);
	wrong += differ(arena[(5 + 3) % SCATTERED * 2 + 8], bounce + 100, 200);
	fact("list-wrong", wrong);
	fact("list-unmap", unmap(iova, SCATTERED * PAGE));
}

/* --- what it must not reach ----------------------------------------------- */

static void fill_arena(void)
{
	u32 page;

	for (page = 0; page < ARENA_PAGES; page++)
		fill(arena[page], PAGE, page);
}

/* Bytes that are not as fill_arena() left them, in all pages but one. */
static u32 arena_changed(u32 except)
{
	u32 page, count = 0;

	for (page = 0; page < ARENA_PAGES; page++)
		if (page != except)
			count += changed(arena[page], PAGE, page);
	return count;
}

static void stray_facts(void)
{
	u8 *page = arena[MAPPED];
	u8 *last = arena[MAPPED + 8];
	u64 iova, read_only, stale, tail;

	fill_arena();
	iova = map((u64)page, PAGE, PVDMA_MAP_READ | PVDMA_MAP_WRITE);
	read_only = map((u64)arena[MAPPED + 2], PAGE, PVDMA_MAP_READ);
	stale = map((u64)arena[MAPPED + 4], PAGE, PVDMA_MAP_READ | PVDMA_MAP_WRITE);
	tail = map((u64)last, PAGE, PVDMA_MAP_READ | PVDMA_MAP_WRITE);
	fact("stale-unmap", unmap(stale, PAGE));
	load(77);

	/* The guest's own addresses are no bus addresses: nothing is mapped there. */
	store((u64)arena[MAPPED + 6], 1000);
	fact("unmapped-changed", arena_changed(ARENA_PAGES));
	store(stale + 8, 1000);
	fact("stale-changed", arena_changed(ARENA_PAGES));
	store(read_only + 16, 1000);
	fact("read-only-changed", arena_changed(ARENA_PAGES));
	store(0x0fff0000, 16);
	fact("far-changed", arena_changed(ARENA_PAGES));
	/* Off the end of a page: what is in it arrives, what is behind does not. */
	store(tail + PAGE - 100, 300);
	fact("walk-missed", differ(last + PAGE - 100, bounce, 100));
	fact("walk-changed-in-page", changed(last, PAGE - 104, MAPPED + 8));
	fact("walk-changed-outside", arena_changed(MAPPED + 8));
	fill_arena();
	/* And into one that is for reading. */
	store(iova + PAGE - 8, 300);
	fact("walk-read-only-missed", differ(page + PAGE - 8, bounce, 8));
	fact("walk-read-only-changed", arena_changed(MAPPED));

	/* A read that is refused gives nothing of what is there. */
	fill_arena();
	load(78);
	fetch((u64)arena[MAPPED + 6], 1000);
	store(iova, 1000);
	fact("read-got-it", differ(page, arena[MAPPED + 6], 1000) == 0);
	load(79);
	fetch(stale, 1000);
	store(iova, 1000);
	fact("read-got-stale", differ(page, arena[MAPPED + 4], 1000) == 0);

	/* No bus master: as if it were not there. */
	fill(page, PAGE, MAPPED);
	load(80);
	pci_write(slot, 0, PCI_COMMAND, PCI_MEMORY);
	store(iova, 1000);
	fact("no-master-changed", changed(page, PAGE, MAPPED));
	pci_write(slot, 0, PCI_COMMAND, PCI_MEMORY | PCI_MASTER);
	fact("master-again-wrong", there_and_back(page, iova, 0, 2000, 1000));
	fact("outside-at-end", arena_changed(MAPPED));
	fact("unmap-read-only", unmap(read_only, PAGE));
	fact("unmap-tail", unmap(tail, PAGE));
	fact("unmap", unmap(iova, PAGE));
}

/* Ranges that are not in the device's buffer: nothing is copied. */
static void bounds_facts(void)
{
	static const struct {
		u64 at;
		u64 bytes;
	} ranges[] = {
		{ EDU_BUFFER - 1, 1 }, { EDU_BUFFER, PAGE + 1 }, { EDU_BUFFER + PAGE, 1 },
		{ EDU_BUFFER + 4000, 97 }, { 0, 16 }, { ~0ull, 16 }, { EDU_BUFFER, ~0ull },
		{ 1ull << 63, 1ull << 63 }, { EDU_BUFFER + (1ull << 32), 16 }, { EDU_BUFFER, 1ull << 32 },
	};
	u8 *page = arena[MAPPED];
	u64 iova = map((u64)page, PAGE, PVDMA_MAP_READ | PVDMA_MAP_WRITE);
	u32 i;

	fill_arena();
	load(81);
	for (i = 0; i < sizeof(ranges) / sizeof(ranges[0]); i++) {
		write64(edu + EDU_SOURCE, ranges[i].at);
		write64(edu + EDU_TARGET, iova);
		write64(edu + EDU_BYTES, ranges[i].bytes);
		write32(edu + EDU_COMMAND, EDU_RUN | EDU_TO_MEMORY);
		fact("bounds-store-done", wait_for(EDU_COMMAND, EDU_RUN, 0));
		write64(edu + EDU_SOURCE, iova);
		write64(edu + EDU_TARGET, ranges[i].at);
		write32(edu + EDU_COMMAND, EDU_RUN);
		fact("bounds-fetch-done", wait_for(EDU_COMMAND, EDU_RUN, 0));
	}
	fact("bounds-changed", arena_changed(ARENA_PAGES));
	store(iova, PAGE);
	fact("bounds-buffer-changed", differ(page, bounce, EDU_BYTES_MAX));
	/* All of the buffer, and nothing of it, are fine. */
	write64(edu + EDU_SOURCE, EDU_BUFFER);
	write64(edu + EDU_TARGET, iova);
	write64(edu + EDU_BYTES, PAGE);
	write32(edu + EDU_COMMAND, EDU_RUN | EDU_TO_MEMORY);
	wait_for(EDU_COMMAND, EDU_RUN, 0);
	fact("bounds-all-changed", changed(page, PAGE, MAPPED) > PAGE / 2);
	fact("bounds-unmap", unmap(iova, PAGE));
	fact("bounds-alive", read32(edu + EDU_IDENTITY));
}

/* The host has seen to it that the device does not survive a factorial. */
static void lose(void)
{
	u32 status;
	u64 iova;

	write32(edu + EDU_FACTORIAL, 5);
	while (read32(edu + EDU_IDENTITY) != ~0u)
		relax();
	write32(edu + EDU_LIVENESS, 5);
	do {
		status = pvdma_map(&host, &counters, device.handle, (u64)bounce, PAGE, EDU_IOVA_MAX,
				   PVDMA_MAP_READ, &iova);
	} while (PVDMA_STATUS_CLASS(status) != PVDMA_STATUS_GONE);
	while (pci_read(slot, 0, 0) != ~0u)
		relax();
	print("guest: lost %u\n", PVDMA_STATUS_ERRNO(status));
	serial_read();
	reset();
}

static void busy(void)
{
	u32 i;

	print("guest: busy\n");
	for (i = 0;; i++) {
		write32(edu + EDU_FACTORIAL, 12);
		edu_fetch(edu, bounce_iova, PAGE);
		edu_store(edu, i & 1 ? bounce_iova : 0x5000000, 64);
	}
}

void guest_main(void)
{
	if (pvdma_discover(&host) != PVDMA_FOUND || !find_edu()) {
		print("guest: no edu\n");
		if (has_option("lose"))
			serial_read();
		return;
	}
	if (has_option("lose"))
		lose();
	make_content();
	bounce_iova = map((u64)bounce, PAGE, PVDMA_MAP_READ | PVDMA_MAP_WRITE);
	if (has_option("busy"))
		busy();
	config_facts();
	register_facts();
	interrupt_facts();
	dma_facts();
	stray_facts();
	if (has_option("bounds"))
		bounds_facts();
	fact("last-unmap", unmap(bounce_iova, PAGE));
	print("guest: done\n");
}
