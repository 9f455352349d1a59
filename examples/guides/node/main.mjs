// A Node program with a child process. It knows nothing of Rethaw: the client finds the model by OPENAI_BASE_URL.
import { fork } from "node:child_process";
import { once } from "node:events";
import OpenAI from "openai";

const client = new OpenAI();
const child = fork(new URL("./tally.mjs", import.meta.url));

async function tell(message) {
  child.send(message);
  const [answer] = await once(child, "message");
  return answer;
}

let ticks = 0;
const timer = setInterval(() => ticks++, 10);
const messages = [];
for (const what of ["fruit", "tree", "bird"]) {
  messages.push({ role: "user", content: `Name a ${what}, in one word.` });
  let word = "";
  const stream = await client.chat.completions.create({ model: process.env.MODEL ?? "gpt-5-mini", messages, stream: true });
  for await (const part of stream) word += part.choices[0]?.delta?.content ?? "";
  messages.push({ role: "assistant", content: word });
  const { words, letters } = await tell({ word });
  console.log(`${what}: ${word}; the child has ${words} words of ${letters} letters`);
}
clearInterval(timer);
const { seen } = await tell({ word: null });
console.log(`the child saw ${seen.join(", ")}; the timer ran: ${ticks > 0}`);
child.disconnect();
