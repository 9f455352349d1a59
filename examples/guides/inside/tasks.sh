# Takes tasks from the inbox, asks a person about each, says when it is done. No Python, no library.
set -eu
n=0
while task=$(rethaw receive --timeout 7d) && [ "$task" != '"stop"' ]; do
    n=$((n + 1))
    rethaw emit began "{\"number\": $n}"
    if [ "$(rethaw wait "approve-$n" --timeout 3d)" = true ]; then
        rethaw snapshot > /dev/null # what follows is not done again after a crash
        rethaw send --json "{\"number\": $n, \"done\": $task}"
    fi
done
rethaw result "{\"tasks\": $n}"
