// EditKit's widgets. Each one writes ordinary input values of its node, so a workflow runs alike without this script.
import { app } from "../../../scripts/app.js";
import { loadStrings, onNode, paintSockets } from "./page.js";
import { chips } from "./chips.js";
import { compare } from "./compare.js";
import { gallery } from "./gallery.js";
import { learning } from "./learning.js";
import { maps } from "./maps.js";
import { strip } from "./strip.js";

const WIDGETS = {
  EditKit_AlignPrompts: chips,
  EditKit_AttentionMaps: maps,
  EditKit_CompositeSource: compare,
  EditKit_DilationSchedule: strip,
  EditKit_Imagic: learning,
  EditKit_LayeredEmbeddings: learning,
  EditKit_LayeredTune: learning,
  EditKit_NullText: learning,
  EditKit_RankByText: gallery,
  EditKit_StyleInvert: learning,
  EditKit_TuneDecoder: learning,
  EditKit_TuneLatent: learning,
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
