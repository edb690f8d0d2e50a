// EditKit's widgets. Each one writes ordinary input values of its node, so a workflow runs alike without this script.
import { app } from "../../../scripts/app.js";
import { loadStrings, onNode, paintSockets } from "./page.js";
import { chips } from "./chips.js";
import { compare } from "./compare.js";
import { gallery } from "./gallery.js";
import { strip } from "./strip.js";

const WIDGETS = {
  EditKit_AlignPrompts: chips,
  EditKit_CompositeSource: compare,
  EditKit_DilationSchedule: strip,
  EditKit_RankByText: gallery,
};

app.registerExtension({
  name: "EditKit.Widgets",
  setup() {
    paintSockets();
    return loadStrings();
  },
  nodeCreated(node) {
    const make = WIDGETS[node.comfyClass ?? node.constructor?.comfyClass];
    if (make) onNode(node, make);
  },
});
