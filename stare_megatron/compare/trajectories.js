// The viewer of sampled trajectories. Their data is parsed when the section comes near the screen, and one trajectory at
// a time is laid out. What a model wrote only ever becomes the text of a text node.
"use strict";

(() => {
  const root = document.getElementById("viewer");
  if (!root) return;
  const at = (id) => document.getElementById("t-" + id);
  const HEAT = { surprisal: 4, entropy: 2 }; // nats at which the colour is full
  const CALLS = /<tool_call>[\s\S]*?(?:<\/tool_call>|$)|<code>[\s\S]*?(?:<\/code>|$)|```\w*\n[\s\S]*?(?:```|$)/g;
  const STRONGEST = 78; // per cent of the colour where it is full
  let runs = null; // of the embedded data
  let tokens = []; // of the trajectory on show: what is known of each, and its element
  let current = -1;

  function make(tag, className, text) {
    const element = document.createElement(tag);
    if (className) element.className = className;
    if (text !== undefined) element.textContent = text;
    return element;
  }

  const short = (v, digits = 4) => (Number.isFinite(v) ? String(Number(v.toPrecision(digits))) : "not finite");

  function options(select, labels) {
    select.replaceChildren(...labels.map((label, i) => {
      const option = make("option", "", label);
      option.value = i;
      return option;
    }));
  }

  const run = () => runs[Number(at("run").value)];
  const step = () => run().steps[Number(at("step").value)];
  const item = () => step().items[Number(at("item").value)];

  function pickRun() {
    options(at("step"), run().steps.map((s) => String(s.step)));
    at("step").value = run().steps.length - 1;
    pickStep();
  }

  function pickStep() {
    options(at("item"), step().items.map((x) => `${x.prompt}, sample ${x.sample}: reward ${short(x.reward)}`));
    show();
  }

  function move(by) {
    const select = at("item");
    const count = select.options.length;
    select.value = (Number(select.value) + by + count) % count;
    show();
  }

  // One record per token; numbers are undefined where the file has none.
  function tokensOf(trajectory) {
    let position = 0;
    return trajectory.spans.map((span) => {
      const column = (name) => (span[name] ? decode(span[name]) : null);
      const ids = decode(span.ids);
      const engine = column("rollout_logprobs"), logprob = column("logprobs"), raw = column("raw_logprobs");
      const entropy = column("entropies"), weight = column("weights"), selection = column("selection");
      const version = column("versions");
      return span.pieces.map((text, i) => ({
        text, kind: span.kind, id: ids[i], position: position++, engine: engine?.[i], logprob: logprob?.[i],
        raw: raw?.[i], entropy: entropy?.[i], weight: weight?.[i], selection: selection?.[i], version: version?.[i],
        advantage: logprob ? trajectory.advantage : undefined,
        surprisal: logprob ? -logprob[i] : engine ? -engine[i] : undefined,
        difference: raw && engine ? raw[i] - engine[i] : undefined,
      }));
    });
  }

  function show() {
    const trajectory = item();
    const spans = tokensOf(trajectory);
    tokens = spans.flat();
    current = -1;
    at("facts").replaceChildren(make("b", "reward", short(trajectory.reward)), document.createTextNode(
      `${trajectory.facts}${trajectory.advantage === null ? "" : `, advantage ${short(trajectory.advantage)}`}`));
    const blocks = [];
    let turn = 0;
    spans.forEach((own, i) => {
      const kind = trajectory.spans[i].kind;
      let head = { prompt: "Prompt", observation: "Tool result" }[kind];
      if (kind === "action") {
        const known = trajectory.turns[turn];
        turn += 1;
        head = `Turn ${turn}` + said(known);
      }
      blocks.push(block(kind, head, own, trajectory.spans[i + 1]?.kind === "observation"));
    });
    const ends = [["Right answer", trajectory.answer], ["Note", trajectory.note]];
    for (const [name, text] of ends) if (text) blocks.push(plainBlock(name, text));
    at("body").replaceChildren(...blocks);
    paint();
    detail();
  }

  function said(turn) {
    if (!turn) return "";
    const calls = turn.calls.map((c) => `${c.tool} ${c.outcome} in ${short(c.seconds, 3)} s`);
    return (calls.length ? `: ${calls.join("; ")}` : "") + (turn.void ? ": void, neither a call nor an answer" : "");
  }

  function block(kind, head, own, called) {
    const box = make("section", `span ${kind}`);
    box.append(make("div", "label", `${head} (${own[0]?.id === undefined ? "text only" : `${own.length} tokens`})`));
    const text = make("div", "text");
    // A tool call is what the environment answered to: found in the text, bounded by whole tokens.
    const ranges = called ? [...own.map((t) => t.text).join("").matchAll(CALLS)].map((m) => [m.index, m.index + m[0].length]) : [];
    let offset = 0, inside = null;
    for (const token of own) {
      const end = offset + token.text.length;
      const range = ranges.find(([a, b]) => offset < b && (end > a || (offset === end && offset >= a && offset > 0)));
      if (range && inside?.range !== range) {
        inside = { range, box: make("div", "call") };
        text.append(inside.box);
      } else if (!range) inside = null;
      (inside ? inside.box : text).append(elementOf(token));
      offset = end;
    }
    box.append(text);
    return box;
  }

  function elementOf(token) {
    const element = make("span", "t", token.text);
    element.dataset.i = token.position;
    if (token.text === "") element.classList.add("part");
    else if (/^\s*\n\s*$/.test(token.text)) element.classList.add("line");
    token.element = element;
    return element;
  }

  function plainBlock(name, text) {
    const box = make("section", "span said");
    box.append(make("div", "label", name), make("div", "text", text));
    return box;
  }

  function paint() {
    const mode = at("colour").value;
    const known = tokens.filter((t) => t[mode] !== undefined && t.kind === "action");
    const largest = Math.max(1e-9, ...known.map((t) => Math.abs(t[mode])).filter(Number.isFinite));
    for (const token of tokens) {
      const { element } = token;
      const value = token.kind === "action" ? token[mode] : undefined;
      element.classList.toggle("pos", mode === "selection" && value === 1);
      element.classList.toggle("neg", mode === "selection" && value === -1);
      let background = "";
      if (mode !== "selection" && value !== undefined && !Number.isFinite(value)) background = "var(--heat)";
      else if (mode in HEAT && value > 0) background = mix("--heat", value / HEAT[mode]);
      else if (mode === "difference" && value) background = mix(value > 0 ? "--more" : "--less", Math.abs(value) / largest);
      element.style.background = background;
    }
    legend(mode, known.length, largest);
  }

  function mix(name, share) {
    const percent = Math.round(STRONGEST * Math.min(1, share));
    return percent ? `color-mix(in srgb, var(${name}) ${percent}%, transparent)` : "";
  }

  function legend(mode, count, largest) {
    const place = at("legend");
    const full = (name) => `color-mix(in srgb, var(${name}) ${STRONGEST}%, transparent)`;
    const bar = (...colours) => {
      const element = make("i", "ramp");
      element.style.background = `linear-gradient(to right, ${colours.join(", ")})`;
      return element;
    };
    const sample = (className, text) => {
      const words = make("span", "key");
      words.append(make("span", `t ${className}`, "token"), document.createTextNode(text));
      return words;
    };
    const made = [];
    if (!count) made.push("Not known of this trajectory" + (tokens.some((t) => t.engine !== undefined) ? ", which was not trained on." : "."));
    else if (mode in HEAT) {
      made.push("0", bar("transparent", full("--heat")), `${HEAT[mode]} nats or more`);
    } else if (mode === "difference") {
      made.push(`engine higher by ${short(largest, 2)}`, bar(full("--less"), "transparent", full("--more")), "trainer higher, nats");
    } else {
      const of = (code) => tokens.filter((t) => t.selection === code).length;
      made.push(sample("pos", ` L+, ${of(1)}`), sample("neg", ` L-, ${of(-1)}`));
    }
    const masked = make("span", "key");
    masked.append(make("span", "masked", "grey"), document.createTextNode(" no loss: prompt, tool results"));
    place.replaceChildren(...made, masked);
  }

  function detail() {
    const place = at("detail");
    const token = tokens[current];
    if (!token) {
      place.textContent = "Point at a token, tap it, or walk with ← and → for its numbers.";
      return;
    }
    const facts = [["id", token.id], ["position", token.position]];
    if (token.kind !== "action") facts.push(["", `${token.kind}, no loss`]);
    const add = (name, value) => { if (value !== undefined && value !== null) facts.push([name, short(value)]); };
    add("surprisal", token.surprisal);
    add("entropy", token.entropy);
    add("advantage", token.advantage);
    add("weight", token.weight);
    if (token.selection !== undefined) facts.push(["selection", { 1: "L+", "-1": "L-", 0: "neither" }[token.selection]]);
    add("engine log-prob", token.engine);
    add("trainer log-prob", token.raw);
    add("difference", token.difference);
    add("policy version", token.version);
    const shown = make("code", "", JSON.stringify(token.text));
    place.replaceChildren(shown, ...facts.filter(([, v]) => v !== undefined).map(([name, value]) => {
      const fact = make("span", "fact", name ? `${name} ` : "");
      fact.append(make("b", "", String(value)));
      return fact;
    }));
  }

  function choose(index, scroll) {
    if (index < 0 || index >= tokens.length) return;
    tokens[current]?.element.classList.remove("current");
    current = index;
    tokens[current].element.classList.add("current");
    if (scroll) tokens[current].element.scrollIntoView({ block: "nearest" });
    detail();
  }

  function parse() {
    if (runs) return;
    const data = JSON.parse(document.getElementById("trajectory-data").textContent);
    runs = data.runs;
    options(at("run"), runs.map((r) => r.name));
    pickRun();
  }

  at("run").addEventListener("change", pickRun);
  at("step").addEventListener("change", pickStep);
  at("item").addEventListener("change", show);
  at("colour").addEventListener("change", paint);
  at("back").addEventListener("click", () => move(-1));
  at("next").addEventListener("click", () => move(1));
  const body = at("body");
  const index = (event) => Number(event.target.closest?.(".t")?.dataset.i ?? -1);
  body.addEventListener("pointerover", (e) => { if (e.pointerType !== "touch") choose(index(e), false); });
  body.addEventListener("click", (e) => choose(index(e), false));
  body.addEventListener("keydown", (e) => {
    const to = { ArrowRight: current + 1, ArrowLeft: Math.max(0, current - 1), Home: 0, End: tokens.length - 1 }[e.key];
    if (to === undefined) return;
    e.preventDefault();
    choose(to, true);
  });
  new IntersectionObserver((entries) => { if (entries.some((e) => e.isIntersecting)) parse(); }, { rootMargin: "600px" }).observe(root);
  addEventListener("beforeprint", parse);
  window.trajectories = { parse, choose, tokens: () => tokens.map(({ element, ...known }) => known) };
})();
