// Times llama.cpp for llama_cpp.py:  node llama_cpp.mjs FILE THREADS
// For each line "STEPS PROMPT" on standard input, one line of JSON: seconds per decoded token, and seconds from a prompt of
// PROMPT tokens to the first token.
import { createInterface } from "node:readline";
import { getLlama } from "node-llama-cpp";

const [, , modelPath, threads] = process.argv;
const llama = await getLlama({ gpu: false, build: "never", maxThreads: Number(threads), logLevel: "error" });
const model = await llama.loadModel({ modelPath });
const context = await model.createContext({ contextSize: 2048, threads: Number(threads), flashAttention: false });
const sequence = context.getSequence();

async function timed(steps, prompt) {
  await sequence.clearHistory();
  const tokens = Array.from({ length: prompt }, (_, place) => 5 + place);
  const start = performance.now();
  let first = 0;
  let seen = 0;
  for await (const _token of sequence.evaluate(tokens, { temperature: 0, yieldEogToken: true })) {
    if (seen === 0) first = performance.now();
    if (seen++ === steps) break;
  }
  return { step: (performance.now() - first) / steps / 1000, first: (first - start) / 1000 };
}

console.log(JSON.stringify({ bytes: model.size, system: llama.systemInfo }));
for await (const line of createInterface({ input: process.stdin })) {
  const [steps, prompt] = line.split(" ").map(Number);
  console.log(JSON.stringify(await timed(steps, prompt)));
}
process.exit(0);
