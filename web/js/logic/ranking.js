/** The candidates as the gallery shows them: the picked one first, then best first. `bar` is 0.06 to 1 of the width. */
export function cards(scores, order, pick) {
  const low = Math.min(...scores);
  const span = Math.max(...scores) - low;
  const shown = pick >= 0 && pick < scores.length ? [pick, ...order.filter((index) => index !== pick)] : [...order];
  return shown.map((index) => ({
    index,
    rank: order.indexOf(index) + 1,
    score: scores[index],
    bar: span > 0 ? 0.06 + 0.94 * ((scores[index] - low) / span) : 1,
    picked: index === pick,
  }));
}

/** 255 on the border of a mask (0 or 1 per pixel), 0 elsewhere: pixels inside that touch the outside or the image's edge. */
export function outline(mask, width, height) {
  const edge = new Uint8Array(width * height);
  for (let y = 0; y < height; y++) {
    for (let x = 0; x < width; x++) {
      const at = y * width + x;
      if (!mask[at]) continue;
      const inner = x > 0 && y > 0 && x < width - 1 && y < height - 1;
      const surrounded = inner && mask[at - 1] && mask[at + 1] && mask[at - width] && mask[at + width];
      edge[at] = surrounded ? 0 : 255;
    }
  }
  return edge;
}

/** The number of columns for which `count` square images, each with `caption` pixels below it, are largest. */
export function columns(count, width, height, caption = 0) {
  let best = { columns: 1, side: -Infinity };
  for (let n = 1; n <= count; n++) {
    const side = Math.min(width / n, height / Math.ceil(count / n) - caption);
    if (side > best.side) best = { columns: n, side };
  }
  return best.columns;
}
