// How a sub-model looks: a hue by its place on the ladder, from amber (smallest) over rose and violet to blue (full),
// and, for who cannot tell hues apart, a kind of underline.

const PATTERNS = ["dotted", "dashed", "solid", "double", "wavy"];
const FIRST_HUE = 70;
const ARC = 175; // degrees, backwards through red

/** `{hue, pattern, known}` of each id: `tints(ids).of(id)`. `ids` in ladder order, smallest first. */
export function tints(ids) {
  const places = new Map(ids.map((id, place) => [id, place]));
  return {
    of(id) {
      const place = places.get(id);
      if (place === undefined) return { hue: 0, pattern: "solid", known: false };
      const share = ids.length > 1 ? place / (ids.length - 1) : 1;
      const hue = (FIRST_HUE - share * ARC + 360) % 360;
      return { hue, pattern: PATTERNS[place % PATTERNS.length], known: true };
    },
  };
}

/** Class and style of an element in a sub-model's tint; the stylesheets make colours of it, in either theme. */
export function tinted({ hue, pattern, known }, classes = "") {
  return {
    class: `${classes} ${known ? "tinted" : "untinted"} underline-${pattern}`.trim(),
    style: { "--hue": hue.toFixed(1) },
  };
}

/** The colour for a canvas, which reads no stylesheet. */
export function canvasColour({ hue, known }, dark) {
  const [lightness, chroma] = dark ? [0.66, 0.125] : [0.72, 0.13];
  return `oklch(${lightness} ${known ? chroma : 0} ${hue.toFixed(1)})`;
}

/** The sub-model a chunk names in its fingerprint, `sortserve-<version>-<sub-model>`; null if it names none. */
export function submodelOf(fingerprint) {
  return /^sortserve-[^-]+-(.+)$/.exec(fingerprint ?? "")?.[1] ?? null;
}
