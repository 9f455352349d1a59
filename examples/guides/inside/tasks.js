// Takes tasks from the inbox, asks a person about each, says when it is done.
const { execFileSync } = require("node:child_process");

function rethaw(...words) {
  const said = execFileSync("rethaw", words, { encoding: "utf8", stdio: ["ignore", "pipe", "inherit"] });
  return said ? JSON.parse(said) : null;
}

let n = 0;
for (;;) {
  const task = rethaw("receive", "--timeout", "7d");
  if (task === "stop") break;
  n += 1;
  rethaw("emit", "began", JSON.stringify({ number: n }));
  if (rethaw("wait", `approve-${n}`, "--timeout", "3d") === true) {
    execFileSync("rethaw", ["snapshot"]); // what follows is not done again after a crash
    rethaw("send", "--json", JSON.stringify({ number: n, done: task }));
  }
}
rethaw("result", JSON.stringify({ tasks: n }));
