// SPDX-License-Identifier: MIT
/*
 * The freestanding guest's support: see lib.h. Touches COM1, the PCI and power
 * ports, the local APIC, and its own memory.
 */
#include "lib.h"
#include "selectors.h"

#include <stdarg.h>

#define COM1			0x3f8
#define COM1_STATUS		(COM1 + 5)
#define COM1_STATUS_DATA	1
#define PM1_CONTROL		0x604
#define PM1_SLEEP_S5		(1 << 13 | 5 << 10)
#define RESET_PORT		0xcf9
#define RESET_CPU		6
#define PCI_ADDRESS		0xcf8
#define PCI_DATA		0xcfc

/* gcc makes calls of these of its own accord */
void *memset(void *to, int byte, unsigned long bytes);
void *memcpy(void *to, const void *from, unsigned long bytes);

void *memset(void *to, int byte, unsigned long bytes)
{
	void *at = to;

	asm volatile("rep stosb" : "+D" (at), "+c" (bytes) : "a" (byte) : "memory");
	return to;
}

void *memcpy(void *to, const void *from, unsigned long bytes)
{
	void *at = to;

	asm volatile("rep movsb" : "+D" (at), "+S" (from), "+c" (bytes) : : "memory");
	return to;
}

/* The VMM lets us wait when the terminal is behind, so nothing is polled here. */
static void put(char c)
{
	if (c == '\n')
		out8(COM1, '\r');
	out8(COM1, c);
}

static void put_number(u64 value, u32 base)
{
	char digits[20];
	u32 count = 0;

	do {
		digits[count++] = "0123456789abcdef"[value % base];
		value /= base;
	} while (value);
	while (count)
		put(digits[--count]);
}

static u32 print_lock;

void print(const char *format, ...)
{
	va_list arguments;

	lock(&print_lock);
	va_start(arguments, format);
	for (; *format; format++) {
		bool is_long = false;

		if (*format != '%') {
			put(*format);
			continue;
		}
		if (*++format == 'l') {
			is_long = true;
			format++;
		}
		if (*format == 's') {
			const char *text = va_arg(arguments, const char *);

			while (*text)
				put(*text++);
		} else {
			u64 value = is_long ? va_arg(arguments, unsigned long)
					    : va_arg(arguments, unsigned int);

			put_number(value, *format == 'x' ? 16 : 10);
		}
	}
	va_end(arguments);
	unlock(&print_lock);
}

u8 serial_read(void)
{
	u32 i;

	/* seldom enough that the VMM gets to do something else */
	while (!(in8(COM1_STATUS) & COM1_STATUS_DATA))
		for (i = 0; i < 1000; i++)
			relax();
	return in8(COM1);
}

static void halt(void) __attribute__((noreturn));
static void halt(void)
{
	for (;;)
		asm volatile("cli; hlt");
}

void power_off(void)
{
	out16(PM1_CONTROL, PM1_SLEEP_S5);
	halt();
}

void reset(void)
{
	out8(RESET_PORT, RESET_CPU);
	halt();
}

static void pci_select(u32 device, u32 function, u32 offset)
{
	out32(PCI_ADDRESS, 1u << 31 | device << 11 | function << 8 | (offset & 0xfc));
}

u32 pci_read(u32 device, u32 function, u32 offset)
{
	pci_select(device, function, offset);
	return in32(PCI_DATA);
}

void pci_write(u32 device, u32 function, u32 offset, u32 value)
{
	pci_select(device, function, offset);
	out32(PCI_DATA, value);
}

/* The zero page (Documentation/arch/x86/zero-page.rst), by its offsets. */
#define ZERO_PAGE_E820_ENTRIES	0x1e8
#define ZERO_PAGE_CMD_LINE	0x228
#define ZERO_PAGE_E820		0x2d0
#define E820_RAM		1

struct e820_entry {
	u64 gpa;
	u64 bytes;
	u32 type;
} __attribute__((packed));

struct guest_ram guest_ram;
static const char *command_line;

bool same_text(const char *a, const char *b)
{
	while (*a && *a == *b)
		a++, b++;
	return *a == *b;
}

/* What follows the word on the command line: "", " ..." or "=..."; NULL without it. */
static const char *find_option(const char *word)
{
	const char *at = command_line;

	while (*at) {
		const char *expected = word;

		while (*at == ' ')
			at++;
		while (*at && *at != ' ' && *at == *expected)
			at++, expected++;
		if (!*expected && (!*at || *at == ' ' || *at == '='))
			return at;
		while (*at && *at != ' ')
			at++;
	}
	return NULL;
}

bool has_option(const char *word)
{
	return find_option(word) != NULL;
}

u64 option_number(const char *word, u64 otherwise)
{
	const char *at = find_option(word);
	u64 value = 0;

	if (!at || *at != '=')
		return otherwise;
	for (at++; *at >= '0' && *at <= '9'; at++)
		value = 10 * value + (u64)(*at - '0');
	return value;
}

static void read_zero_page(const u8 *zero_page)
{
	const struct e820_entry *e820 = (const void *)(zero_page + ZERO_PAGE_E820);
	u32 entries = zero_page[ZERO_PAGE_E820_ENTRIES];
	u32 i;

	command_line = (const char *)(u64)*(const u32 *)(zero_page + ZERO_PAGE_CMD_LINE);
	for (i = 0; i < entries; i++) {
		u64 end = e820[i].gpa + e820[i].bytes;

		if (e820[i].type != E820_RAM)
			continue;
		if (e820[i].gpa >= 1ull << 32)
			guest_ram.high_end = end;
		else if (end > guest_ram.low_end)
			guest_ram.low_end = end;
	}
}

/*
 * Page tables: 5 GiB one to one, in pages of 2 MiB, writable and open to CPL 3;
 * the fourth, where devices are, uncached.
 */
#define GIBS		5u
#define PTE_USER	7ull
#define PTE_UNCACHED	(3ull << 3)
#define PTE_LARGE	(1ull << 7)
#define DEVICES_GIB	3u

u64 page_tables[2 + GIBS][512] __attribute__((aligned(4096)));

static void set_page_tables(void)
{
	u32 i;

	page_tables[0][0] = (u64)page_tables[1] | PTE_USER;
	for (i = 0; i < GIBS; i++)
		page_tables[1][i] = (u64)page_tables[2 + i] | PTE_USER;
	for (i = 0; i < GIBS * 512; i++)
		page_tables[2 + i / 512][i % 512] = (u64)i << 21 | PTE_LARGE | PTE_USER |
						    (i / 512 == DEVICES_GIB ? PTE_UNCACHED : 0);
	asm volatile("movq %0, %%cr3" : : "r" (page_tables) : "memory");
}

/* Segments, task state, interrupts: Intel SDM vol. 3, 3.4.5, 6.14.1 and 8.7. */
struct table_register {
	u16 limit;
	u64 base;
} __attribute__((packed));

struct task_state {
	u32 reserved;
	u64 rsp0;
	u8 unused[88];
	u16 io_map_offset;
	/* a bit per port, clear: CPL 3 may use it; then a byte of ones */
	u8 io_map[65536 / 8 + 1];
} __attribute__((packed));

struct gate {
	u16 offset_low;
	u16 selector;
	u8 stack;
	u8 type;
	u16 offset_middle;
	u32 offset_high;
	u32 reserved;
};

#define SEGMENT_CODE	0x00209b0000000000ull
#define SEGMENT_DATA	0x00cf93000000ffffull
#define SEGMENT_USER	(3ull << 45)
#define SEGMENT_TASK	0x0000890000000000ull
#define GATE_INTERRUPT	0x8e
#define INVALID_OPCODE	6

extern const u8 exception_stubs[], user_end[], interrupt_stack_end[];
void user_return(void) __attribute__((noreturn));

u64 gdt[GDT_ENTRIES];
static struct gate idt[EXCEPTIONS];
static struct task_state task_state;

static void set_gate(u32 vector, const void *handler)
{
	u64 at = (u64)handler;

	idt[vector] = (struct gate) {
		.offset_low = (u16)at, .offset_middle = (u16)(at >> 16),
		.selector = KERNEL_CODE, .type = GATE_INTERRUPT,
	};
}

static void load_idt(void)
{
	struct table_register idt_register = { sizeof(idt) - 1, (u64)idt };

	asm volatile("lidt %0" : : "m" (idt_register));
}

/* The task state, and with it CPL 3, is the first CPU's alone. */
static void set_descriptors(void)
{
	struct table_register gdt_register = { sizeof(gdt) - 1, (u64)gdt };
	u64 task = (u64)&task_state;
	u32 i;

	task_state.rsp0 = (u64)interrupt_stack_end;
	task_state.io_map_offset = (u16)((u64)task_state.io_map - task);
	task_state.io_map[65536 / 8] = 0xff;
	gdt[KERNEL_CODE / 8] = SEGMENT_CODE;
	gdt[KERNEL_DATA / 8] = SEGMENT_DATA;
	gdt[USER_DATA / 8] = SEGMENT_DATA | SEGMENT_USER;
	gdt[USER_CODE / 8] = SEGMENT_CODE | SEGMENT_USER;
	gdt[TASK_STATE / 8] = SEGMENT_TASK | (sizeof(task_state) - 1) |
			      (task & 0xffffff) << 16 | (task & 0xff000000) << 32;
	asm volatile("lgdt %0" : : "m" (gdt_register));
	asm volatile("ltr %w0" : : "r" (TASK_STATE));

	for (i = 0; i < EXCEPTIONS; i++)
		set_gate(i, exception_stubs + 16 * i);
	load_idt();
}

/* What the stubs and the CPU pushed. */
struct exception_frame {
	u64 vector, error, rip, cs, rflags, rsp, ss;
};

void exception_report(const struct exception_frame *frame) __attribute__((noreturn));
void exception_report(const struct exception_frame *frame)
{
	u64 cr2;

	if (frame->vector == INVALID_OPCODE && frame->rip == (u64)user_end)
		user_return();
	asm volatile("movq %%cr2, %0" : "=r" (cr2));
	/* whoever holds it, this CPU perhaps, is done printing */
	unlock(&print_lock);
	print("guest: exception %lu, error 0x%lx, at 0x%lx, CPL %u, cr2 0x%lx\n",
	      (unsigned long)frame->vector, (unsigned long)frame->error,
	      (unsigned long)frame->rip, (u32)frame->cs & 3, (unsigned long)cr2);
	power_off();
}

/*
 * The other CPUs (Intel SDM vol. 3, 9.4 and 11.6): an INIT stops one wherever it
 * is, a SIPI starts it in real mode at page `vector'.
 */
#define LAPIC_SPURIOUS		(LAPIC + 0xf0)
#define LAPIC_ENABLED		0x1ff
#define LAPIC_COMMAND		(LAPIC + 0x300)
#define LAPIC_COMMAND_HIGH	(LAPIC + 0x310)
#define COMMAND_INIT		0x4500
#define COMMAND_STARTUP		0x4600

extern const u8 trampoline[], trampoline_end[];
void cpu_start(u32 cpu) __attribute__((noreturn));

static void (*job)(u32 cpu);
static u32 running;

u32 cpu_count(void)
{
	u32 eax = 1, ebx, ecx, edx;

	asm volatile("cpuid" : "+a" (eax), "=b" (ebx), "=c" (ecx), "=d" (edx));
	ebx = ebx >> 16 & 0xff;
	return ebx < 1 ? 1 : ebx > CPUS_MAX ? CPUS_MAX : ebx;
}

static void send(u32 cpu, u32 command)
{
	write32(LAPIC_COMMAND_HIGH, cpu << 24);
	write32(LAPIC_COMMAND, command);
}

void run_on_cpus(void (*function)(u32 cpu))
{
	u32 count = cpu_count(), cpu;

	memcpy((void *)TRAMPOLINE, trampoline, (u64)(trampoline_end - trampoline));
	write32(LAPIC_SPURIOUS, LAPIC_ENABLED);
	job = function;
	running = count - 1;
	for (cpu = 1; cpu < count; cpu++) {
		/* KVM keeps both until the CPU looks, in this order: there is no need to wait between */
		send(cpu, COMMAND_INIT);
		send(cpu, COMMAND_STARTUP | TRAMPOLINE >> 12);
	}
	function(0);
	while (__atomic_load_n(&running, __ATOMIC_ACQUIRE))
		relax();
}

/* A CPU arrives here from the trampoline, on its own stack. */
void cpu_start(u32 cpu)
{
	load_idt();
	job(cpu);
	__atomic_sub_fetch(&running, 1, __ATOMIC_RELEASE);
	halt();
}

void guest_start(const u8 *zero_page) __attribute__((noreturn));
void guest_start(const u8 *zero_page)
{
	read_zero_page(zero_page);
	set_descriptors();
	set_page_tables();
	guest_main();
	power_off();
}
