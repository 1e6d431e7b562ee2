// Replaces the content by what the process says now; says so when it does not answer.
let rounds = 0;
async function refresh() {
  try {
    const answer = await fetch("/now", { cache: "no-store" });
    if (!answer.ok) throw new Error(await answer.text());
    const opened = [...document.querySelectorAll("details[open]")].length > 0;
    document.querySelector("main").innerHTML = await answer.text();
    if (opened) document.querySelectorAll("details").forEach(d => d.open = true);
    document.querySelector("#stale").style.display = "none";
    document.body.dataset.rounds = ++rounds;
  } catch (error) {
    const stale = document.querySelector("#stale");
    stale.textContent = "no answer: what is shown may be old (" + error.message + ")";
    stale.style.display = "block";
  }
  setTimeout(refresh, 2000);
}
setTimeout(refresh, 2000);
