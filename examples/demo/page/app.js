"use strict";

const $ = (id) => document.getElementById(id);
let last = null; // the last request, for repetitions
let seen = new Set(); // rows that were shown before

// minor turns what a person types into minor units, without floating point.
function minor(text, digits) {
  const m = /^(\d{1,11})(?:[.,](\d+))?$/.exec(text.trim());
  if (!m || (m[2] || "").length > digits) return null;
  return BigInt(m[1] + (m[2] || "").padEnd(digits, "0"));
}

function el(name, text, className) {
  const e = document.createElement(name);
  if (text !== undefined) e.textContent = text;
  if (className) e.className = className;
  return e;
}

const short = (id) => "…" + id.slice(-8);

function badge(state) {
  const good = ["AUTHORIZED", "CONFIRMED", "approved"], bad = ["DECLINED", "PAYMENT_FAILED", "declined"];
  return el("span", state.replaceAll("_", " ").toLowerCase(), "badge " + (good.includes(state) ? "good" : bad.includes(state) ? "bad" : "wait"));
}

function say(state, title, detail) {
  const box = $("answer"), p = el("p");
  if (state) p.append(badge(state), " ");
  p.append(title);
  box.replaceChildren(p);
  if (detail) box.append(el("p", detail));
}

async function send(request) {
  const body = JSON.stringify({ ...request, amount: 0 }).replace('"amount":0', '"amount":' + request.amount);
  const response = await fetch("/payments", { method: "POST", headers: { "Content-Type": "application/json" }, body });
  return { status: response.status, replayed: response.headers.get("Idempotency-Replayed") === "true", body: await response.json() };
}

async function pay(request) {
  say("", "Sent. Waiting for the answer…");
  try {
    const { status, replayed, body } = await send(request);
    if (body.payment_id) {
      say(body.state, `${status}${replayed ? ", from the record" : ""}: payment ${short(body.payment_id)}`, body.message || (body.reason ? "Reason: " + body.reason.replaceAll("_", " ") : "Order " + body.order_id));
    } else {
      say("", `${status}: ${body.title}`, (body.field ? body.field + " " : "") + (body.detail || ""));
    }
  } catch {
    say("", "No answer", "The connection broke. Repeat the request with the same key.");
  }
  refresh();
}

$("form").addEventListener("submit", async (event) => {
  event.preventDefault();
  const currency = $("currency"), digits = Number(currency.selectedOptions[0].dataset.digits);
  const amount = minor($("amount").value, digits);
  $("amount").setAttribute("aria-invalid", amount === null);
  if (amount === null) {
    say("", "Not an amount", `${currency.value} has ${digits} digits after the point.`);
    $("amount").focus();
    return;
  }
  const id = crypto.randomUUID();
  last = {
    idempotency_key: "page-" + id, amount, currency: currency.value, method: $("method").value,
    token: document.querySelector("input[name=token]:checked").value, order_id: "order-" + id,
  };
  $("repeat").disabled = $("burst").disabled = false;
  if ($("kill").value) {
    await fetch("/api/kill/" + $("kill").value, { method: "POST" });
    $("kill").value = "";
  }
  pay(last);
});

$("repeat").addEventListener("click", () => pay(last));

$("burst").addEventListener("click", async () => {
  say("", "20 requests sent…");
  const answers = await Promise.all(Array.from({ length: 20 }, () => send(last).catch(() => null)));
  const got = answers.filter((a) => a && a.body.payment_id);
  const ids = new Set(got.map((a) => a.body.payment_id));
  say(got.length ? got[0].body.state : "", `${got.length} of 20 answered with ${ids.size} payment`, `${answers.length - got.length} were told that the key is in flight or got no answer.`);
  refresh();
});

// rows fills a table, and marks what is new.
function rows(id, list, columns, key, cells, empty) {
  const body = $(id);
  if (!list || list.length === 0) {
    const row = el("tr", undefined, "none"), cell = el("td", empty);
    cell.colSpan = columns;
    row.append(cell);
    body.replaceChildren(row);
    return;
  }
  body.replaceChildren(...list.map((item) => {
    const row = el("tr"), k = id + key(item);
    if (!seen.has(k)) {
      seen.add(k);
      row.className = "new";
    }
    for (const c of cells(item)) {
      const cell = el("td");
      if (Array.isArray(c)) {
        cell.className = "num";
        cell.append(c[0]);
      } else {
        cell.append(c);
      }
      row.append(cell);
    }
    return row;
  }));
}

const code = (text) => el("code", text);

function render(s) {
  rows("payments", s.payments, 4, (p) => p.id + p.state, (p) => [code(short(p.id)), badge(p.state), [p.amount], p.reason.replaceAll("_", " ") || p.token.replace("tok_", "").replaceAll("_", " ")], "No payments yet.");
  rows("charges", s.charges, 3, (c) => c.id, (c) => [code(short(c.id)), badge(c.status), [c.amount]], "No charges yet.");
  rows("ledger", s.ledger, 5, (l) => l.id, (l) => [code(l.id), code(short(l.payment)), l.account.replaceAll("_", " "), [l.debit || ""], [l.credit || ""]], "No entries yet.");
  rows("events", s.events, 3, (e) => e.partition + ":" + e.offset, (e) => [code(e.partition + ":" + e.offset), code(short(e.payment)), badge(e.state)], "No events yet.");
  rows("orders", s.orders, 3, (o) => o.id + o.state, (o) => [code(short(o.id)), badge(o.state), [o.amount]], "No orders yet.");
  rows("books", s.books, 3, (b) => b.currency + b.gateway + b.ledger + b.orders, (b) => [b.gateway, b.ledger, b.orders], "Nothing was charged yet.");
  $("pending").textContent = s.outbox.pending + s.outbox.parked;
  $("dead").textContent = s.outbox.dead;
  $("delivered").textContent = s.outbox.delivered;
  $("open").textContent = s.open;
  $("crashes").textContent = s.crashes;
  const verdict = !s.books ? ["empty", ""] : s.equal ? ["equal", "good"] : ["settling", "wait"];
  if ($("verdict").textContent !== verdict[0]) {
    $("verdict").textContent = verdict[0];
    $("verdict").className = "badge " + verdict[1];
  }
}

let shown = "";
async function refresh() {
  try {
    const response = await fetch("/api/state");
    const text = await response.text();
    if (response.ok && text !== shown) {
      shown = text;
      render(JSON.parse(text));
    }
  } catch {
    $("verdict").textContent = "the demo has ended";
    $("verdict").className = "badge bad";
  }
}

async function watch() {
  await refresh();
  setTimeout(watch, 300);
}
watch();
