# A shell script with a background job, a coprocess and variables, that asks a model what to do next. It knows nothing of Rethaw:
#   rethaw run --image base -e MODEL=gpt-5-mini -- bash -c "$(cat examples/guides/shell/work.sh)"
set -euo pipefail
cd "$(mktemp -d)"

ask() { # the answer to $1, after everything said so far
    python3 - "$1" <<'PY'
import json, os, sys, urllib.request

talk = json.load(open("talk.json")) if os.path.exists("talk.json") else []
talk.append({"role": "user", "content": sys.argv[1]})
request = urllib.request.Request(
    os.environ["OPENAI_BASE_URL"] + "/chat/completions",
    json.dumps({"model": os.environ.get("MODEL", "gpt-5-mini"), "messages": talk}).encode(),
    {"content-type": "application/json", "authorization": "Bearer " + os.environ["OPENAI_API_KEY"]},
)
with urllib.request.urlopen(request, timeout=600) as answer:
    talk.append(json.load(answer)["choices"][0]["message"])
json.dump(talk, open("talk.json", "w"))
print(talk[-1]["content"])
PY
}

# A job that goes on in the background while the model thinks: one line for each tick, none may be missing.
(n=0; while [ ! -e stop ]; do n=$((n + 1)); echo "$n" >> ticks; sleep 0.1; done) &
ticker=$!
# A process at the other end of two pipes, which keeps a sum in its memory.
coproc SUM { total=0; while read -r number; do total=$((total + number)); echo "$total"; done; }
said=()

for step in 1 2 3; do
    answer=$(ask "Step $step: give me one whole number, nothing else.")
    number=$(grep -o '[0-9]\+' <<< "$answer" | head -n 1)
    echo "$number" >&"${SUM[1]}"
    read -r total <&"${SUM[0]}"
    said+=("$number")
    echo "step $step: the model said $number, the sum is $total"
done

kill -0 "$ticker" && echo "the background job is still there"
touch stop
wait "$ticker"
if [ "$(cat ticks)" = "$(seq "$(wc -l < ticks)")" ]; then echo "it counted without a gap"; else echo "ticks are missing"; fi
echo "said: ${said[*]}"
