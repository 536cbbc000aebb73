"use strict";
// Puts what the server renders in its place: the live look without loading the page anew, and the numbers every few
// seconds. It keeps nothing: no storage, no cookie of its own, and a file leaves this device only when asked to.

const REFRESH_MS = 5000;
const WAITING_MS = 3000;
const SIGNED_OUT = 401;

const main = document.querySelector("main");
const look = document.getElementById("look");
const told = document.getElementById("told");
const sample = document.getElementById("sample");
const own = document.getElementById("own");
let looking = 0;
let again;

async function fragment(url, options) {
  const response = await fetch(url, {credentials: "same-origin", redirect: "error", ...options});
  if (response.status === SIGNED_OUT) {
    location.assign("login");
    throw new Error("signed out");
  }
  if (!response.ok) {
    const problem = await response.json().catch(() => ({}));
    throw new Error([problem.title || `status ${response.status}`, problem.detail].filter(Boolean).join(": "));
  }
  return new DOMParser().parseFromString(await response.text(), "text/html").body.childNodes;
}

async function show(url, options, onWaiting) {
  const mine = ++looking;
  clearTimeout(again);
  look.setAttribute("aria-busy", "true");
  told.textContent = "Looking…";
  try {
    const nodes = await fragment(url, options);
    if (mine !== looking) return;
    look.replaceChildren(...nodes);
    told.textContent = "";
    if (!look.querySelector("[data-waiting]")) return;
    if (onWaiting) again = setTimeout(onWaiting, WAITING_MS);
    else told.textContent = "Decoders are being trained. Look again in a while.";
  } catch (error) {
    if (mine === looking) told.textContent = `That did not work: ${error.message}.`;
  } finally {
    if (mine === looking) look.removeAttribute("aria-busy");
  }
}

function showSample() {
  const number = new FormData(sample).get("sample");
  return show(`look?sample=${encodeURIComponent(number)}`, {}, showSample);
}

function showOwn() {
  const file = document.getElementById("own-image").files[0];
  if (!file) {
    told.textContent = "Choose an image first.";
    return undefined;
  }
  const headers = {"X-Form-Token": main.dataset.formToken, "Content-Type": "application/octet-stream"};
  return show("look", {method: "POST", headers, body: file});
}

async function refresh() {
  if (document.hidden) return;
  const traffic = document.getElementById("traffic");
  if (traffic.contains(document.activeElement)) return;  // a table that is being scrolled by the keyboard stays
  try {
    const nodes = await fragment("traffic");
    const left = traffic.querySelector(".scroll")?.scrollLeft ?? 0;
    traffic.replaceChildren(...nodes);
    const scroll = traffic.querySelector(".scroll");
    if (scroll) scroll.scrollLeft = left;
  } catch {
    // The next one may work; numbers that are old say when they are from no better than none.
  }
}

if (sample) {
  sample.addEventListener("submit", event => {
    event.preventDefault();
    showSample();
  });
  const next = document.getElementById("next");
  next.hidden = false;
  next.addEventListener("click", () => {
    const number = document.getElementById("sample-number");
    const following = Number(number.value) + 1;
    number.value = following > Number(number.max) ? number.min : following;
    showSample();
  });
  own.hidden = false;
  own.addEventListener("submit", event => {
    event.preventDefault();
    showOwn();
  });
  if (look.querySelector("[data-waiting]")) again = setTimeout(showSample, WAITING_MS);
}
setInterval(refresh, REFRESH_MS);
