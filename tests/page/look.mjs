// Looks at the live page as a person would: with a mouse, with the keyboard, on a phone. Prints what it saw as JSON.
//
//     node look.mjs URL FOLDER [KEY]
import { chromium } from "playwright-core";

const [url, folder, key] = process.argv.slice(2);
const browser = await chromium.launch({ executablePath: process.env.CHROMIUM ?? "/usr/bin/chromium", args: ["--no-sandbox"] });
const seen = { problems: [] };

function watchFor(page) {
  page.setDefaultTimeout(15_000);
  page.on("pageerror", (error) => seen.problems.push(String(error)));
  page.on("console", (message) => {
    // Wanted: a refused key, and the trace of a request that still runs.
    if (message.type() === "error" && !/401|404/.test(message.text())) seen.problems.push(message.text());
  });
  page.on("request", (request) => {
    if (!request.url().startsWith(url) && !request.url().startsWith("data:")) seen.problems.push(`asked ${request.url()}`);
  });
}

async function open(width, height) {
  const page = await browser.newPage({ viewport: { width, height } });
  watchFor(page);
  await page.goto(`${url}/dashboard`);
  if (key) {
    await page.getByLabel("Key of this gateway").fill("wrong");
    await page.keyboard.press("Enter");
    await page.getByText("This key does not fit.").waitFor();
    await page.getByLabel("Key of this gateway").fill(key);
    await page.keyboard.press("Enter");
  }
  await page.locator("#requests button").first().waitFor();
  return page;
}

const texts = (page, selector) => page.locator(selector).allInnerTexts();

// 1. With a mouse.
const page = await open(1280, 900);
await page.waitForTimeout(3000);
seen.services = await texts(page, "#services .name");
seen.meters = await page.locator("#ranks progress").count();
seen.decisions = await texts(page, "#decisions .meter span:first-child");
await page.screenshot({ path: `${folder}/dashboard.png` });
await page.locator("#requests button", { hasText: /finished/ }).last().click();
await page.locator("#waterfall li").first().waitFor();
seen.waterfall = await texts(page, "#waterfall .label");
await page.locator("#waterfall summary").last().click();
seen.details = await texts(page, "#waterfall li:last-child dt");
await page.screenshot({ path: `${folder}/waterfall.png` });

// 2. With the keyboard alone: close, down one request, open it, close again; focus is never lost to an update.
await page.keyboard.press("Escape");
seen.closed = !(await page.locator("#trace").evaluate((dialog) => dialog.open));
await page.locator("#requests button").first().focus();
await page.keyboard.press("ArrowDown");
await page.waitForTimeout(2500);
seen.focusKept = await page.evaluate(() => document.activeElement.matches("#requests button"));
await page.keyboard.press("Enter");
seen.openedByKey = await page.locator("#trace").evaluate((dialog) => dialog.open);
await page.keyboard.press("Escape");
await page.close();

// 3. On a phone: nothing is wider than the screen, the waterfall neither.
const phone = await open(360, 740);
const width = () => phone.evaluate(() => document.scrollingElement.scrollWidth);
await phone.waitForTimeout(1500);
seen.phoneWidth = await width();
await phone.screenshot({ path: `${folder}/phone.png` });
await phone.locator("#requests button").first().click();
await phone.locator("#trace-note").filter({ hasText: /\w/ }).waitFor();
seen.phoneDialogWidth = await phone.locator("#trace").evaluate((dialog) => dialog.scrollWidth);
await phone.screenshot({ path: `${folder}/phone-waterfall.png` });

await browser.close();
console.log(JSON.stringify(seen));
