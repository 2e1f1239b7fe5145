// Held-out answers, and the viewer of texts. What a model wrote enters the page as text (textContent), never as markup.
"use strict";
(() => {
  const { answers: ANSWERS, texts: DATA } = JSON.parse(document.getElementById("data").textContent);
  const SVG = "http://www.w3.org/2000/svg";
  const MODELS = ["student", "teacher"];
  const NAMES = { "student before": "Student before training", "student after": "Student after training", teacher: "Teacher" };
  const NARROW = window.matchMedia("(max-width: 60rem)"); // where the card of a token would cover the text
  const at = (id) => document.getElementById(id);
  const state = { run: 0, kind: "prompts", item: 0, look: 0, token: 0 };

  // Numbers as `number` and `percent` of base/terminal.py write them.
  function show(value, digits = 3) {
    if (value === null || value === undefined) return "–";
    if (value === 0) return "0";
    const place = Number(value.toExponential(digits - 1).split("e")[1]);
    if (place <= -7 || place >= 15) return value.toExponential(digits - 1).replace(/e([+-])(\d)$/, "e$10$2");
    return value.toLocaleString("en-US", { minimumFractionDigits: Math.max(digits - 1 - place, 0), maximumFractionDigits: Math.max(digits - 1 - place, 0) });
  }
  function percent(share) {
    if (Number.isNaN(share)) return "–";
    const whole = `${Math.round(100 * share)}%`;
    if (!["0%", "100%"].includes(whole) || share === 0 || share === 1) return whole;
    return share < 0.5 ? `${show(100 * share, 2)}%` : `${Number((100 - Number((100 - 100 * share).toPrecision(1))).toPrecision(9))}%`;
  }
  const run = () => DATA[state.run];
  const items = () => run()[state.kind];
  const item = () => items()[state.item];
  const lookOf = (one) => one.looks[Math.min(state.look, one.looks.length - 1)];
  const look = () => lookOf(item());
  // Where teacher and student have different tokenizers, a text stands by words, with the tokens of both; numbers of tokens and
  // shares are of the student's.
  const noun = (one) => (one.readings ? "word" : "token");
  const sizes = (one) => one.tokens.map((_, place) => (one.readings ? one.readings[place][0].length : 1));
  const total = (values) => values.reduce((a, b) => a + b, 0);
  const lengthOf = (one) => total(sizes(one));
  const shareOf = (one) => (one.speakers.length ? total(sizes(one).filter((_, place) => one.speakers[place] === "1")) : NaN) / lengthOf(one);
  const likely = (logProb) => (logProb === null ? "–" : percent(Math.exp(logProb)));
  const reading = (one, place, who) => one.readings[place][who].map((part) => JSON.stringify(part)).join(" ") || "–";
  const spoken = (one, place) => MODELS[Number(one.speakers[place])];

  function element(name, attributes = {}, text = "") {
    const made = document.createElement(name);
    for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
    made.textContent = text;
    return made;
  }

  function shape(name, attributes, text = "") {
    const made = document.createElementNS(SVG, name);
    for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
    made.textContent = text;
    return made;
  }

  function options(select, values, chosen) {
    select.replaceChildren(...values.map(([value, text]) => element("option", { value }, text)));
    select.value = String(chosen);
  }

  // Control characters and lone spaces would not be seen.
  const visible = (text) => text.replace(/[\u0000-\u0009\u000b-\u001f\u007f]/g, (c) => `\\x${c.charCodeAt(0).toString(16).padStart(2, "0")}`);
  const quoted = (text) => (text === "" ? "(part of a character)" : JSON.stringify(text));

  // --- which texts ---

  const within = (value, name) => {
    const [least, most] = [at(`${name}-least`).value, at(`${name}-most`).value];
    if (least === "" && most === "") return true;
    return Number.isFinite(value) && (least === "" || value >= Number(least)) && (most === "" || value <= Number(most));
  };

  function matches(one) {
    const now = lookOf(one);
    return within(100 * shareOf(now), "share") && within(lengthOf(now), "length") && within(now.scores[at("score-name").value], "score");
  }

  function title(one, place) {
    const now = lookOf(one);
    const scored = now.scores[at("score-name").value];
    const score = scored === undefined ? "" : ` · ${at("score-name").value} ${show(scored)}`;
    const when = state.kind === "texts" ? `step ${now.step} · ` : `${place + 1} · `;
    const words = visible(now.tokens.join("")).replace(/\s+/g, " ").trim().slice(0, 40);
    return `${when}${words} · ${percent(shareOf(now))} by the teacher${score} · ${lengthOf(now)} tokens`;
  }

  function list() {
    const found = items().map((one, place) => [place, one]).filter(([, one]) => matches(one));
    at("count").textContent = `${found.length} of ${items().length} texts`;
    if (!found.some(([place]) => place === state.item) && found.length) state.item = found[0][0];
    options(at("text"), found.map(([place, one]) => [place, title(one, place)]), state.item);
    return found.length > 0;
  }

  // --- one text ---

  function draw() {
    const any = list();
    document.querySelector(".text").hidden = !any;
    at("token").hidden = !any || NARROW.matches;
    if (!any) return;
    const now = look();
    const looks = item().looks;
    state.token = Math.min(state.token, Math.max(now.tokens.length - 1, 0));
    at("time").hidden = looks.length < 2;
    at("look").max = looks.length - 1;
    at("look").value = Math.min(state.look, looks.length - 1);
    at("look").setAttribute("aria-valuetext", `step ${now.step}`);
    at("step").textContent = now.step;
    at("earlier").disabled = state.look <= 0;
    at("later").disabled = state.look >= looks.length - 1;
    at("facts").textContent = facts(now);
    at("prompt").textContent = visible(item().prompt);
    at("reference-part").hidden = !item().reference;
    at("reference").textContent = visible(item().reference || "");
    at("response").setAttribute("aria-label", `The text, a ${noun(now)} each`);
    at("response").replaceChildren(...now.tokens.map((text, place) => token(now, text, place)));
    if (!now.tokens.length) at("response").textContent = "(nothing was written)";
    chart(now);
    if (at("table-part").open) table(now);
    choose(state.token);
  }

  function facts(now) {
    const first = now.speakers.indexOf("1");
    const scores = Object.entries(now.scores).map(([name, value]) => `${name} ${show(value)}`);
    return [`step ${now.step}`, ...(now.readings ? [`${now.tokens.length} words`] : []), `${lengthOf(now)} tokens`, now.end, `${percent(shareOf(now))} by the teacher`,
      first < 0 ? "all by the student" : `the teacher's first ${noun(now)}: ${first}`, ...scores].join(" · ");
  }

  function token(now, text, place) {
    const made = element("span", { class: `token ${spoken(now, place)}`, role: "option", id: `token-${place}`, "aria-selected": "false" }, visible(text));
    const tokens = now.readings ? MODELS.map((name, who) => `${name}: ${reading(now, place, who)}`).join("  ·  ") : "";
    made.setAttribute("aria-label", `${place}, ${spoken(now, place)}: ${quoted(text)}${tokens && ` (${tokens})`}`);
    if (tokens) made.title = tokens;
    if (text === "") made.append(element("span", { class: "empty" }, "·"));
    made.addEventListener("pointerenter", (event) => { if (event.pointerType !== "touch") choose(place); });
    made.addEventListener("click", () => { choose(place); at("token").hidden = false; });
    return made;
  }

  function choose(place) {
    const now = look();
    if (!now.tokens.length) { at("token-facts").replaceChildren(); return; }
    document.querySelectorAll("#response .chosen").forEach((old) => { old.classList.remove("chosen"); old.setAttribute("aria-selected", "false"); });
    state.token = place;
    const chosen = at(`token-${place}`);
    chosen.classList.add("chosen");
    chosen.setAttribute("aria-selected", "true");
    at("response").setAttribute("aria-activedescendant", chosen.id);
    at("token-facts").replaceChildren(...described(now, place));
    const here = document.querySelector("#chart .here");
    if (here) here.setAttribute("x", here.dataset.left * 1 + place * here.dataset.width);
  }

  function described(now, place) {
    const lines = [["place in the text", place], ["written by", `the ${spoken(now, place)}`]];
    if (now.readings) MODELS.forEach((name, who) => lines.push([`the ${name}'s tokens`, reading(now, place, who)]));
    if (now.divergences[place] !== null) lines.push([`divergence (${run().unit})`, show(now.divergences[place])]);
    if (now.thresholds[place] !== null) lines.push([`threshold (${run().unit})`, show(now.thresholds[place])]);
    if (now.jsd && (run().unit !== "bits" || now.divergences[place] === null)) lines.push(["Jensen-Shannon divergence (bits)", show(now.jsd[place])]);
    if (now.logProbs) MODELS.forEach((name, who) => lines.push([`probability, ${name}`, likely(now.logProbs[who][place])]));
    const facts = element("table");
    for (const [name, value] of lines) {
      const row = facts.insertRow();
      row.append(element("th", { scope: "row" }, name), element("td", {}, String(value)));
    }
    const parts = [element("h3", {}, quoted(now.tokens[place])), facts];
    if (now.jsd && now.readings && now.jsd[place] === null) parts.push(element("p", {}, "The two have no token in common here, so that what they say cannot be compared."));
    return now.top ? [...parts, best(now, place)] : [...parts, element("p", {}, "What else was likely is kept only for the prompts that are answered again and again.")];
  }

  function best(now, place) {
    const made = element("table");
    made.append(element("caption", {}, now.readings ? "Most likely tokens where it begins" : "Most likely tokens here"));
    const head = made.createTHead().insertRow();
    MODELS.forEach((name) => head.append(element("th", { scope: "col", colspan: 2 }, name)));
    const body = made.createTBody();
    const rows = Math.max(...now.top.map((model) => model[place].length));
    for (let rank = 0; rank < rows; rank++) {
      const row = body.insertRow();
      for (const model of now.top) {
        const [id, logProb] = model[place][rank] ?? [null, null];
        row.append(element("td", {}, id === null ? "" : quoted(run().vocabulary[id])), element("td", {}, id === null ? "" : likely(logProb)));
      }
    }
    return made;
  }

  function table(now) {
    const columns = ["place", noun(now), "by", ...(now.readings ? MODELS.map((name) => `the ${name}'s tokens`) : []), `divergence (${run().unit})`, `threshold (${run().unit})`, ...(now.logProbs ? ["probability, student", "probability, teacher"] : [])];
    const head = element("thead");
    head.append(element("tr"));
    head.firstChild.append(...columns.map((name) => element("th", { scope: "col" }, name)));
    const body = element("tbody");
    now.tokens.forEach((text, place) => {
      const cells = [place, quoted(text), spoken(now, place), ...(now.readings ? MODELS.map((_, who) => reading(now, place, who)) : []), show(now.divergences[place]), show(now.thresholds[place])];
      if (now.logProbs) cells.push(...now.logProbs.map((model) => likely(model[place])));
      const row = element("tr");
      row.append(...cells.map((cell) => element("td", {}, String(cell))));
      body.append(row);
    });
    at("table").replaceChildren(head, body);
  }

  // --- divergence against threshold ---

  function chart(now) {
    const svg = at("chart"), width = Math.min(Math.max(svg.parentElement.clientWidth, 280), 720), [height, left, top, bottom] = [204, 54, 16, 40];
    const looked = now.divergences.some((value) => value !== null);
    const values = looked || !now.jsd ? now.divergences : now.jsd;
    const unit = looked || !now.jsd ? run().unit : "bits";
    const numbers = [...values, ...now.thresholds].filter((value) => value !== null);
    const most = Math.max(...numbers, unit === "nats" ? 0.1 : 1);
    const [step, tall] = [(width - left) / Math.max(now.tokens.length, 1), height - top - bottom];
    const x = (place) => left + place * step;
    const y = (value) => top + tall * (1 - value / most);
    const parts = [shape("rect", { class: "here", x: x(state.token), y: top, width: step, height: tall, "data-left": left, "data-width": step })];
    for (const value of [0, most / 2, most]) {
      parts.push(shape("line", { class: "axis", x1: left, x2: width, y1: y(value), y2: y(value) }));
      parts.push(shape("text", { x: left - 4, y: y(value) + 4, "text-anchor": "end" }, show(value, 2)));
    }
    values.forEach((value, place) => {
      if (value === null) return;
      const bar = shape("rect", { class: spoken(now, place), x: x(place) + step * 0.1, y: y(value), width: step * 0.8, height: Math.max(y(0) - y(value), 0.5) });
      parts.push(bar);
    });
    parts.push(shape("path", { class: "threshold", d: line(now.thresholds, x, y, step) }));
    [...now.speakers].forEach((who, place) => {
      parts.push(shape("rect", { class: MODELS[Number(who)], x: x(place), y: height - bottom + 3, width: step + 0.3, height: 5 }));
      if (who !== (now.speakers[place - 1] ?? "0") && step >= 4) parts.push(...mark(x(place), top, height - bottom, who));
    });
    const every = Math.ceil(now.tokens.length / 8);
    for (let place = 0; place < now.tokens.length; place += every) parts.push(shape("text", { x: x(place), y: height - 19 }, String(place)));
    parts.push(shape("text", { x: (left + width) / 2, y: height - 4, "text-anchor": "middle" }, `place in the text (${noun(now)}s)`));
    parts.push(shape("text", { transform: `translate(12 ${top + tall / 2}) rotate(-90)`, "text-anchor": "middle" }, `divergence (${unit})`));
    svg.setAttribute("viewBox", `0 0 ${width} ${height}`);
    svg.replaceChildren(shape("title", { id: "chart-title" }, summary(now, values, unit)), ...parts);
    svg.onclick = (event) => {
      const box = svg.getBoundingClientRect();
      const place = Math.floor((((event.clientX - box.left) / box.width) * width - left) / step);
      if (place >= 0 && place < now.tokens.length) choose(place);
    };
    const compared = now.thresholds.some((value) => value !== null);
    at("chart-key").textContent = `Each bar: how far the two models disagree about that ${noun(now)} (${looked ? "the divergence that the rule looks at" : "Jensen-Shannon divergence"}, ${unit}); ` +
      `blue where the student wrote, orange where the teacher did. ${compared ? "Dashed: the threshold. " : ""}▼ the teacher takes over, ▲ it hands back.`;
  }

  function line(values, x, y, step) {
    let path = "", pen = "M";
    values.forEach((value, place) => {
      if (value === null) { pen = "M"; return; }
      path += `${pen}${x(place).toFixed(1)} ${y(value).toFixed(1)}H${(x(place) + step).toFixed(1)}`;
      pen = "L";
    });
    return path || "M0 0";
  }

  function mark(x, top, bottom, who) {
    const tip = who === "1" ? `M${x - 5} ${top - 12}h10l-5 9z` : `M${x - 5} ${top - 3}h10l-5 -9z`;
    return [shape("line", { class: "switch", x1: x, x2: x, y1: top, y2: bottom }), shape("path", { class: "mark", d: tip })];
  }

  function summary(now, values, unit) {
    const seen = values.filter((value) => value !== null);
    if (!seen.length) return "The rule looked at no divergence in this text.";
    const above = values.filter((value, place) => value !== null && now.thresholds[place] !== null && value > now.thresholds[place]).length;
    const first = now.speakers.indexOf("1");
    return `Divergence over ${now.tokens.length} ${noun(now)}s: mean ${show(total(seen) / seen.length)} ${unit}, highest ${show(Math.max(...seen))}; ` +
      `above the threshold at ${above} ${noun(now)}s; ${first < 0 ? "the teacher wrote nothing" : `the teacher first wrote at ${noun(now)} ${first}`}.`;
  }

  // --- what a person does ---

  const moveLook = (by) => { state.look = Math.min(Math.max(state.look + by, 0), item().looks.length - 1); draw(); };
  const moveToken = (to) => { const last = look().tokens.length - 1; if (last >= 0) choose(Math.min(Math.max(to, 0), last)); };
  const moveText = (by) => {
    const select = at("text"), place = select.selectedIndex + by;
    if (place >= 0 && place < select.options.length) { state.item = Number(select.options[place].value); draw(); }
  };

  function chooseRun(place) {
    state.run = place;
    const kinds = [["prompts", "the same prompts, again and again"], ["texts", "texts that were trained on"]].filter(([name]) => run()[name].length);
    state.kind = kinds.length ? kinds[0][0] : "prompts";
    options(at("kind"), kinds, state.kind);
    at("notes").textContent = run().notes.join(" ");
    const names = [...new Set(run().prompts.flatMap((one) => one.looks.flatMap((now) => Object.keys(now.scores))))];
    at("score").hidden = !names.length;
    options(at("score-name"), names.map((name) => [name, name]), names[0] ?? "");
    chooseKind(state.kind);
  }

  function chooseKind(kind) {
    state.kind = kind;
    state.item = state.token = 0;
    state.look = Math.max(0, ...items().map((one) => one.looks.length - 1));
    draw();
  }

  // --- held-out answers side by side ---

  const shown = { run: 0, item: 0 };

  function drawAnswers() {
    const own = ANSWERS[shown.run], one = own.items[shown.item];
    at("answers-place").textContent = `question ${one.number} of ${own.all}`;
    at("answers-back").disabled = shown.item <= 0;
    at("answers-on").disabled = shown.item >= own.items.length - 1;
    at("answers-prompt").textContent = one.prompt;
    at("answers-prompt-part").hidden = !one.prompt;
    at("answers-reference").textContent = one.references.join("\n\n— or —\n\n");
    at("answers-reference-part").hidden = !one.references.length;
    at("answers-models").replaceChildren(...Object.entries(one.models).map(([model, said]) => {
      const made = element("article", { class: model.split(" ").pop() });
      const scores = Object.entries(said.scores).filter(([name]) => !["length", "eos"].includes(name)).map(([name, value]) => ` · ${name} ${value}`);
      made.append(element("h4", {}, NAMES[model]), element("p", { class: "words" }, said.text || "(nothing was written)"),
        element("p", { class: "facts" }, `${said.length}, ${said.end}${scores.join("")}`));
      return made;
    }));
    at("answers-notes").textContent = own.notes.join(" ");
  }

  function chooseAnswers(run, item) {
    shown.run = run;
    shown.item = Math.min(Math.max(item, 0), ANSWERS[run].items.length - 1);
    drawAnswers();
  }

  if (ANSWERS.length) {
    options(at("answers-run"), ANSWERS.map((one, place) => [place, one.label]), 0);
    at("answers-run-part").hidden = ANSWERS.length < 2;
    at("answers-controls").hidden = false;
    at("answers-run").addEventListener("change", (event) => chooseAnswers(Number(event.target.value), ANSWERS[Number(event.target.value)].first));
    at("answers-back").addEventListener("click", () => chooseAnswers(shown.run, shown.item - 1));
    at("answers-on").addEventListener("click", () => chooseAnswers(shown.run, shown.item + 1));
    chooseAnswers(0, ANSWERS[0].first);
  }
  if (!DATA.length) return;

  at("run").addEventListener("change", (event) => chooseRun(Number(event.target.value)));
  at("kind").addEventListener("change", (event) => chooseKind(event.target.value));
  at("text").addEventListener("change", (event) => { state.item = Number(event.target.value); draw(); });
  at("look").addEventListener("input", (event) => { state.look = Number(event.target.value); draw(); });
  at("earlier").addEventListener("click", () => moveLook(-1));
  at("later").addEventListener("click", () => moveLook(1));
  at("table-part").addEventListener("toggle", () => { if (at("table-part").open) table(look()); });
  const form = document.querySelector("form.controls");
  form.addEventListener("input", (event) => { if (!["run", "kind"].includes(event.target.id)) draw(); });
  form.addEventListener("submit", (event) => event.preventDefault());
  form.addEventListener("reset", (event) => {
    event.preventDefault();
    form.querySelectorAll("input").forEach((field) => { field.value = ""; });
    draw();
  });
  const keys = {
    ArrowLeft: () => moveToken(state.token - 1), ArrowRight: () => moveToken(state.token + 1), Home: () => moveToken(0),
    End: () => moveToken(Infinity), ArrowUp: () => moveText(-1), ArrowDown: () => moveText(1), "[": () => moveLook(-1), "]": () => moveLook(1),
  };
  at("response").addEventListener("keydown", (event) => {
    if (!(event.key in keys) || event.ctrlKey || event.altKey || event.metaKey) return;
    event.preventDefault();
    keys[event.key]();
  });

  at("close").addEventListener("click", () => { at("token").hidden = true; });
  NARROW.addEventListener("change", draw);
  options(at("run"), DATA.map((one, place) => [place, one.label]), 0);
  at("run").parentElement.hidden = DATA.length < 2;
  at("viewer").hidden = false;
  chooseRun(0);
})();
