// The child: what it was told is in its memory only.
const seen = [];
process.on("message", ({ word }) => {
  if (word !== null) seen.push(word);
  process.send({ words: seen.length, letters: seen.join("").length, seen });
});
