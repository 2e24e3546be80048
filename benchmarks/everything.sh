#!/bin/bash
# Every benchmark of docs/results.md, docs/linears.md, docs/serve.md and docs/guide.md, the most important first. Doraemon's are in
# doraemon/everything.sh, those of GPUs in gpu.py and gpu_compiled.py.
#
#   benchmarks/everything.sh             what there is, with the minutes expected on two cores that nothing else uses
#   benchmarks/everything.sh 1 2 7       these parts, one after the other, in any order
#   benchmarks/everything.sh all
#   benchmarks/everything.sh page        the pages of what is there
#
# DATA is the folder with text/ and eval/, SAMPLE the model that methods are compared on, PY and PY_VLLM the Pythons of
# the environments. Parts of quality go on where they were stopped; parts of speed need cores on which nothing else runs.
REPO=$(cd "$(dirname "$0")/.." && pwd)
PY=${PY:-$REPO/.venv/bin/python} PY_VLLM=${PY_VLLM:-$REPO/.venv-vllm/bin/python}
DATA=${DATA:-$REPO/../shared/data} SAMPLE=${SAMPLE:-$REPO/../shared/models/gpt2-wiki-7m}
# family and model of the processor: one name is given to several
CPU=cpu$(sed -n 's/^cpu family.*: //p; s/^model\t.*: //p' /proc/cpuinfo | head -2 | paste -sd-)
OUT=benchmarks/results
cd "$REPO" || exit 1

WIKIPEDIA=("$DATA"/text/wikipedia_en_2014.00*.txt) NOVELS=("$DATA"/text/novels100.0*.txt)
texts() { printf " $1 %s" "${@:2}"; }
TEXT=$(texts --text "${WIKIPEDIA[@]}" "${NOVELS[@]}") EVAL="--evaluation $DATA/eval/wikitext2-test-detok.txt"
EQUAL="benchmarks/equal_quality.py"
LLAMA="benchmarks/llama_cpp.py --threads 2"
BENCH="-m tardis_llm bench --shape falcon-7b --batch 1,8 --json"
INT4="--layers 16 --fold-dtype int4 --fallback int4 --linears int4 --against int4"
VLLM="benchmarks/vllm_decode.py decode" BITS="--fold-bits 4 --fallback-bits 4 --linear-bits 4"
TASKS="--tasks blimp:2010,lambada:500,hellaswag:250 --task-data $DATA/eval"

PARTS=(
  # minutes | threads | command of Python; of a line with > the output is a file
  "25|1|$EQUAL quality sample --calibration 65536 --data $DATA"
  "4|2|$EQUAL speed sample --threads 2"
  "9|2|$EQUAL speed sample --threads 2 --layers 32 --only int4 q4_0-pure tardis-int4@0.83 --rounds 5 --steps 12"
  "180|1|$EQUAL quality qwen2.5-coder-0.5b --code 0.25 --data $DATA"
  "6|2|$EQUAL speed qwen2.5-coder-0.5b --threads 2"
  "120|1|$EQUAL quality gemma-3-270m --data $DATA"
  "5|2|$EQUAL speed gemma-3-270m --threads 2"
  "5|2|$LLAMA --fix-rates 0.05,0.1,0.2,0.3 --output $OUT/llama_cpp_falcon-7b_8_2_$CPU.json"
  "3|2|$LLAMA --batch 2 --prompt 128 --output $OUT/llama_cpp_falcon-7b_8_2_batch2_$CPU.json"
  "3|2|$LLAMA --batch 4 --prompt 128 --output $OUT/llama_cpp_falcon-7b_8_2_batch4_$CPU.json"
  "5|2|$LLAMA --batch 8 --prompt 128 --output $OUT/llama_cpp_falcon-7b_8_2_batch8_$CPU.json"
  "6|1|benchmarks/llama_cpp.py --threads 1 --output $OUT/llama_cpp_falcon-7b_8_1_$CPU.json"
  "9|2|$LLAMA --layers 32 --fix-rates 0.05 --rounds 5 --steps 12 --output $OUT/llama_cpp_falcon-7b_32_2_$CPU.json"
  "9|2|$LLAMA --layers 32 --fix-rates 0.2 --rounds 5 --steps 12 --output $OUT/llama_cpp_falcon-7b_32_2_fixed20_$CPU.json"
  "5|2|$LLAMA --shape llama-3-8b --output $OUT/llama_cpp_llama-3-8b_8_2_$CPU.json"
  "3|2|$LLAMA --shape qwen2.5-0.5b --layers 24 --fix-rates 0.16,0.27,0.43 --output $OUT/llama_cpp_qwen2.5-0.5b_24_2_$CPU.json"
  "6|2|$LLAMA --instructions avx2 --fix-rates 0.05,0.1,0.2,0.3 --rounds 5 --output $OUT/llama_cpp_falcon-7b_8_2_avx2_$CPU.json"
  "4|2|$LLAMA --instructions avx2 --shape qwen2.5-0.5b --layers 24 --fix-rates 0.16,0.27,0.43 --mixed 0.53:0.05,0.42:0.1 --rounds 5 --output $OUT/llama_cpp_qwen2.5-0.5b_24_2_avx2_$CPU.json"
  "8|2|$BENCH --against dense,kernels > $OUT/bench-1-falcon-7b-bf16.json"
  "9|2|$BENCH --against dense,kernels --compile > $OUT/bench-1-falcon-7b-bf16-compiled.json"
  "5|2|$BENCH $INT4 > $OUT/bench-2-falcon-7b-int4.json"
  "5|2|$BENCH $INT4 --compile > $OUT/bench-2-falcon-7b-int4-compiled.json"
  "4|1|benchmarks/ffn_kernels.py --batch 1,8 --output $OUT/kernels-1.json"
  "4|2|benchmarks/ffn_kernels.py --batch 1,8 --output $OUT/kernels-2.json"
  "15|2|benchmarks/linears.py --output $OUT/linears.json"
  "15|2|benchmarks/heads.py qwen2.5-coder-0.5b"
  "2|2|benchmarks/step.py"
  "12|1|benchmarks/packed.py $SAMPLE $TEXT $EVAL"
  "15|1|benchmarks/prefill.py $SAMPLE $TEXT $EVAL"
  "150|1|-m tardis_llm compare $SAMPLE -o $OUT/compare $TEXT --eval-text $DATA/eval/wikitext2-test-detok.txt $TASKS"
  "120|1|benchmarks/ablation.py $SAMPLE $(texts --wikipedia "${WIKIPEDIA[@]}") $(texts --novels "${NOVELS[@]}") $EVAL --lambada $DATA/eval/lambada-test.jsonl"
  "400|1|benchmarks/real_models.py --data $DATA --calibration 32768 --items 0"
  "120|1|benchmarks/real_models.py --data $DATA --calibration 16384 --items 0 --models qwen2.5-coder-0.5b --methods teal,cats,tardis --reductions 0.5 --output $OUT/real_models_half.json"
  "4|vllm|$VLLM --shape falcon-16x2048 $BITS --against dense,int4 --batch 1,4,8 --output $OUT/vllm_decode_falcon_int4.json"
  "6|vllm|$VLLM --shape falcon-7b --layers 8 $BITS --against int4 --batch 1,4,8 --output $OUT/vllm_decode_falcon_7b_int4.json"
  "4|vllm|$VLLM --shape falcon-16x2048 --prompt 256 --batch 1 --output $OUT/vllm_prompt_falcon.json"
  "4|vllm|$VLLM --shape falcon-16x2048 $BITS --prompt 256 --batch 1 --output $OUT/vllm_prompt_falcon_int4.json"
  "1|1|benchmarks/instruction_sets.py --output $OUT/instruction_sets.json"
)

# a part's number, minutes and command, in which many files are three dots
show() { printf '%2d  %4s min  %s\n' $(($1 + 1)) "${PARTS[$1]%%|*}" "$(sed "s,$(echo $DATA),DATA,g; s/^[^|]*|[^|]*|//; s/\(\(--text\|--wikipedia\|--novels\) [^ ]* *\)\+/\2 ... /g" <<< "${PARTS[$1]}")"; }
if [ $# -eq 0 ]; then
  for number in "${!PARTS[@]}"; do show "$number"; done
  exit
fi
[ "$1" = page ] && exec sh -c "$PY benchmarks/results.py && $PY benchmarks/vllm_results.py"
[ "$1" = all ] && set -- $(seq ${#PARTS[@]})
for number in "$@"; do
  IFS='|' read -r _ threads command <<< "${PARTS[$((number - 1))]}"
  echo "== $(show $((number - 1))) ($(date +%T))"
  run=$PY cores=0
  [ "$threads" = vllm ] && run=$PY_VLLM cores=0-1
  [ "$threads" = 2 ] && cores=0-1
  export OMP_NUM_THREADS=${threads/vllm/1}
  if [[ $command == *" > "* ]]; then # the file gets its name when all of it is there
    file=${command#* > }
    taskset -c $cores "$run" ${command% > *} > "$file.part" && mv "$file.part" "$file" || echo "part $number failed"
  else
    taskset -c $cores "$run" $command || echo "part $number failed"
  fi
done
date +%T
