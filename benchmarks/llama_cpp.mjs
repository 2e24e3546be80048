// Times llama.cpp for llama_cpp.py:  node llama_cpp.mjs FILE THREADS SEQUENCES
// For each line "STEPS PROMPT" on standard input, one line of JSON: seconds per step, in which each sequence gets a token,
// and seconds from prompts of PROMPT tokens to the first tokens. llama.cpp decodes the sequences as one batch.
import { createInterface } from "node:readline";
import { getLlama } from "node-llama-cpp";

const [, , modelPath, threads, count] = process.argv;
const llama = await getLlama({ gpu: false, build: "never", maxThreads: Number(threads), logLevel: "error" });
const model = await llama.loadModel({ modelPath });
const size = { contextSize: 2048, sequences: Number(count) };
const context = await model.createContext({ ...size, threads: Number(threads), flashAttention: false });
const sequences = Array.from({ length: Number(count) }, () => context.getSequence());

// When the first token came, and the one `steps` later.
async function decoded(sequence, steps, tokens) {
  let first = 0;
  let seen = 0;
  for await (const _token of sequence.evaluate(tokens, { temperature: 0, yieldEogToken: true })) {
    if (seen === 0) first = performance.now();
    if (seen++ === steps) break;
  }
  return [first, performance.now()];
}

async function timed(steps, prompt) {
  for (const sequence of sequences) await sequence.clearHistory();
  const tokens = Array.from({ length: prompt }, (_, place) => 5 + place);
  const start = performance.now();
  const times = await Promise.all(sequences.map((sequence) => decoded(sequence, steps, tokens)));
  const first = Math.max(...times.map((each) => each[0]));
  const last = Math.max(...times.map((each) => each[1]));
  return { step: (last - first) / steps / 1000, first: (first - start) / 1000 };
}

console.log(JSON.stringify({ bytes: model.size, system: llama.systemInfo }));
for await (const line of createInterface({ input: process.stdin })) {
  const [steps, prompt] = line.split(" ").map(Number);
  console.log(JSON.stringify(await timed(steps, prompt)));
}
process.exit(0);
