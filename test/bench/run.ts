// `npm run bench`: runs the benchmarks, prints their figures, and writes them as a report (JSON, a page, a chart per section).

import { fork } from "node:child_process";
import { existsSync, mkdirSync, readFileSync, writeFileSync } from "node:fs";
import { cpus } from "node:os";
import { join, relative } from "node:path";
import { parseArgs } from "node:util";
import { repoRoot } from "../lab/cache.js";
import type { Measured } from "./program.js";
import { type Report, reportHtml, type Section, sectionSvg, sectionText } from "./report.js";

/** Those without a lab first: they are quick. */
const BENCHMARKS: Readonly<Record<string, string>> = {
  engine: "the mapping engine alone, over a backend that does nothing",
  controller: "the emulated NVMe controller alone, in one thread",
  bounds: "a hypercall beside a bare exit in C, here and in the lab, and maps beside a C program's",
  dma: "in the lab: what a driver pays for DMA under each policy, and under QEMU",
  memory: "in the lab: pinned memory, granules, the time to start, several CPUs, under policy cached",
  nvme: "in the lab: the emulated NVMe disk beside QEMU's under the same guest",
};

const help = `Runs the benchmarks and writes their report.

usage: npm run bench -- [OPTIONS] [NAME...]

${Object.entries(BENCHMARKS)
  .map(([name, about]) => `  ${name.padEnd(14)} ${about}`)
  .join("\n")}

  --rounds N     rounds in the lab, of one or several turns of each contender (default 3)
  --out DIR      where the report goes (default test/bench/REPORT when all are run; else nothing is written).
                 What a report there says of benchmarks that are not run, or not here, stays in it
  --help
`;

function usage(problem: string): never {
  process.stderr.write(`bench: ${problem} (see npm run bench -- --help)\n`);
  process.exit(2);
}

function parse() {
  try {
    return parseArgs({
      allowPositionals: true,
      options: {
        rounds: { type: "string", default: "3" },
        out: { type: "string" },
        help: { type: "boolean", default: false },
      },
    });
  } catch (error) {
    return usage((error as Error).message);
  }
}

const { values, positionals } = parse();
if (values.help) {
  process.stdout.write(help);
  process.exit(0);
}
if (!/^[1-9]\d?$/.test(values.rounds)) usage(`--rounds ${values.rounds}: 1 to 99`);
for (const name of positionals) {
  if (!(name in BENCHMARKS)) usage(`${name}: no such benchmark`);
}
const names = Object.keys(BENCHMARKS).filter(
  (name) => positionals.length === 0 || positionals.includes(name),
);
const out = values.out ?? (positionals.length === 0 ? join(repoRoot, "test/bench/REPORT") : undefined);

const sections: Section[] = [];
const here = {
  Date: new Date().toISOString().slice(0, 10),
  Processor: `${cpus()[0]?.model ?? "unknown"}, ${cpus().length} CPUs`,
  "Node.js": process.version,
};
for (const [index, name] of names.entries()) {
  console.error(`[${index + 1}/${names.length}] ${name}: ${BENCHMARKS[name]}`);
  const measured = await run(name);
  for (const section of measured.sections) {
    console.log(sectionText(section));
    sections.push({ ...section, measured: { ...here, ...section.measured } });
  }
}
if (out !== undefined) {
  mkdirSync(out, { recursive: true });
  const file = join(out, "report.json");
  // Ratios are within a section, and a section is of one run: those of several runs can stand in one report.
  const isPart = positionals.length > 0 && existsSync(file);
  const before: Report = isPart ? (JSON.parse(readFileSync(file, "utf8")) as Report) : { sections: [] };
  const all = new Map([...before.sections, ...sections].map((section) => [section.id, section]));
  const report: Report = { sections: [...all.values()] };
  writeFileSync(file, `${JSON.stringify(report, null, 2)}\n`);
  writeFileSync(join(out, "report.html"), reportHtml(report));
  for (const section of report.sections) writeFileSync(join(out, `${section.id}.svg`), sectionSvg(section));
  console.error(`the report: ${relative(process.cwd(), join(out, "report.html"))}`);
}

/** Runs one benchmark. One that fails ends all: a report with a hole would be taken for a whole one. */
async function run(name: string): Promise<Measured> {
  const child = fork(new URL(`./${name}.js`, import.meta.url), [values.rounds], {
    execArgv: ["--enable-source-maps", "--expose-gc"],
  });
  let measured: Measured | undefined;
  child.on("message", (message) => {
    measured = message as Measured;
  });
  const status = await new Promise<number>((done) => child.on("exit", (code) => done(code ?? 1)));
  if (measured === undefined || status !== 0) {
    console.error(`bench: ${name} ended with status ${status}, and there is no report`);
    process.exit(1);
  }
  return measured;
}
