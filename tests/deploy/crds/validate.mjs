// Reads manifests as a JSON list on standard input, and writes a list as long: null, or what is wrong with each.
// Kinds that no package has a model of are "unknown".
import { readFileSync } from "node:fs";
import * as gateway from "@kubernetes-models/gateway-api/gateway.networking.k8s.io/v1";
import * as keda from "@kubernetes-models/keda/keda.sh/v1alpha1";
import * as monitoring from "@kubernetes-models/prometheus-operator/monitoring.coreos.com/v1";

const groups = {
  "gateway.networking.k8s.io/v1": gateway,
  "keda.sh/v1alpha1": keda,
  "monitoring.coreos.com/v1": monitoring,
};

function wrong(manifest) {
  const Model = groups[manifest.apiVersion]?.[manifest.kind];
  if (Model === undefined) return "unknown";
  try {
    new Model(manifest).validate();
    return null;
  } catch (error) {
    return String(error);
  }
}

console.log(JSON.stringify(JSON.parse(readFileSync(0, "utf8")).map(wrong)));
