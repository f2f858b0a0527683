// The page: keeps a stream of snapshots open, and shows the last one.
import { read, refused } from "./api.js";
import { charts } from "./charts.js";
import { decisions, ranks, requests, services } from "./panels.js";
import { openTrace } from "./waterfall.js";

const byId = (id) => document.getElementById(id);
const RETRY_MS = 2000;

function show(snapshot) {
  byId("mesh").hidden = false;
  charts(byId("charts"), snapshot.pulse);
  services(byId("services"), snapshot.services);
  ranks(byId("ranks"), snapshot.services);
  decisions(byId("decisions"), snapshot.pulse.decisions);
  requests(byId("requests"), snapshot.requests, openTrace);
}

function say(text) {
  // Screen readers are told of changes alone.
  if (byId("connection").textContent !== text) byId("connection").textContent = text;
}

async function watch() {
  for (;;) {
    try {
      const response = await read("/dashboard/api/watch");
      byId("login").hidden = true;
      const lines = response.body.pipeThrough(new TextDecoderStream()).getReader();
      let rest = "";
      for (;;) {
        const { value, done } = await lines.read();
        if (done) break;
        const events = (rest + value).split("\n\n");
        rest = events.pop();
        for (const event of events) show(JSON.parse(event.replace(/^data: /, "")));
        say("live");
      }
    } catch (error) {
      if (refused(error)) {
        say("a key is needed");
        return askForKey();
      }
    }
    say("no answer from the gateway, trying again");
    await new Promise((wake) => setTimeout(wake, RETRY_MS));
  }
}

function askForKey() {
  byId("login-error").textContent = sessionStorage.getItem("key") ? "This key does not fit." : "";
  byId("login").hidden = false;
  byId("key").focus();
}

byId("login").addEventListener("submit", (event) => {
  event.preventDefault();
  sessionStorage.setItem("key", byId("key").value);
  watch();
});

watch();
