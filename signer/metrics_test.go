package signer_test

import (
	"fmt"
	"io"
	"net/http"
	"strings"
	"testing"

	"inkan/signer/client"
	"inkan/simulator"
)

// TestMetricsOfTwoThrottles: an algorithm without a name and the agent are two
// things that one window may be for; there are metrics all the same.
func TestMetricsOfTwoThrottles(t *testing.T) {
	self, _ := executables(t)
	at := simulator.FreePortForTest(t)
	d := start(t, agent("a", self)+"metrics_listen: "+at+"\n")
	text := strings.Replace(scopeJSON, `"version"`, `"repeat_execution_throttle":[{"count":8,"window":{"rolling_s":60}},{"count":4,"per":"strategy","window":{"rolling_s":60}}],"version"`, 1)
	if err := d.signer.Agent("a").SetChain(t.Context(), d.ca.AgentWithKey(t, "a", []byte(text), d.agents["a"].Key, nil).Chain); err != nil {
		t.Fatal(err)
	}
	if _, err := client.New(d.socket).SignJSON(t.Context(), order(client.NewID())); err != nil {
		t.Fatal(err)
	}
	res, err := http.Get(fmt.Sprintf("http://%s/metrics", at))
	if err != nil {
		t.Fatal(err)
	}
	defer res.Body.Close()
	b, err := io.ReadAll(res.Body)
	if err != nil {
		t.Fatal(err)
	}
	want := `inkan_signer_limit_used_ratio{agent="a",key="",limit="repeat_execution_throttle",window="any 1m"} 0.25`
	if res.StatusCode != http.StatusOK || !strings.Contains(string(b), want) {
		t.Errorf("%s, %.2000s", res.Status, b)
	}
}
