package signer_test

import (
	"bytes"
	"context"
	"errors"
	"io"
	"net"
	"net/http"
	"strings"
	"testing"
	"time"

	"inkan/internal/problem"
	"inkan/scope"
	"inkan/signer/client"
)

// TestAcknowledge: an order is open until an operator's process says that it has
// ended, and the answers say what is left and when.
func TestAcknowledge(t *testing.T) {
	self, _ := executables(t)
	d := start(t, agent("a", self))
	limited := strings.Replace(scopeJSON, `"max_order_notional"`, `"max_open_notional":[{"amount":"9000","currency":"EUR"}],"max_open_orders":{"count":1},"max_order_notional"`, 1)
	if err := d.signer.Agent("a").SetChain(t.Context(), d.ca.AgentWithKey(t, "a", []byte(limited), d.agents["a"].Key, nil).Chain); err != nil {
		t.Fatal(err)
	}
	c := client.New(d.socket)
	sign := func(name string) error {
		_, err := c.SignJSON(t.Context(), order(client.NewID(), `"ClOrdID":"1"`, `"ClOrdID":"`+name+`"`))
		return err
	}
	if err := sign("1"); err != nil {
		t.Fatal(err)
	}
	p, ok := errors.AsType[*problem.Problem](sign("2"))
	if !ok || p.Rule != "max_open_orders" || p.Used != "1" || p.Left != "0" || p.Limit != "1" || time.Until(p.FreeAt) < 23*time.Hour {
		t.Fatalf("a second open order: %+v", p)
	}
	ack := func(name string, status scope.AckStatus) client.Acknowledged {
		t.Helper()
		out, err := c.Acknowledge(t.Context(), "a", &scope.Acknowledgement{Venue: "XPAR", ClOrdID: name, Status: status, Time: scope.Timestamp{Time: time.Now().UTC().Truncate(time.Microsecond)}})
		if err != nil || len(out) != 1 {
			t.Fatalf("acknowledging %s: %v, %v", name, out, err)
		}
		return out[0]
	}
	if out := ack("2", scope.AckFilled); out.Rule != scope.RuleAckUnknown {
		t.Errorf("an order that was refused has ended: %+v", out)
	}
	if out := ack("1", scope.AckFilled); out.Rule != "" || out.Counter != 3 {
		t.Errorf("acknowledging an open order: %+v", out)
	}
	if err := sign("3"); err != nil {
		t.Errorf("after the acknowledgement: %v", err)
	}
	post := func(body string) (int, string) {
		h := http.Client{Transport: &http.Transport{DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
			return (&net.Dialer{}).DialContext(ctx, "unix", d.socket)
		}}}
		defer h.CloseIdleConnections()
		res, err := h.Post("http://signer/v1/acknowledgements", "application/json", bytes.NewBufferString(body))
		if err != nil {
			t.Fatal(err)
		}
		defer res.Body.Close()
		b, _ := io.ReadAll(res.Body)
		return res.StatusCode, string(b)
	}
	good := `{"venue":"XPAR","ClOrdID":"3","status":"filled","time":"2026-07-27T09:30:00.123456Z"}`
	for body, want := range map[string]string{
		`{"agent":"b","acknowledgements":[` + good + `]}`:                                                     "no agent of this name",
		`{"agent":"a","acknowledgements":[]}`:                                                                 "1 to 64",
		`{"agent":"a","acknowledgements":[` + strings.Repeat(good+",", 64) + good + `]}`:                      "1 to 64",
		`{"agent":"a","acknowledgements":[` + good + `,{"venue":"XPAR"}]}`:                                    "2: acknowledgement",
		`{"agent":"a","acknowledgements":[` + strings.Replace(good, "filled", "open", 1) + `]}`:               "rejected, filled, cancelled, done",
		`{"agent":"a","acknowledgements":[` + strings.Replace(good, "123456Z", "1Z", 1) + `]}`:                "a time such as",
		`{"agent":"a","acknowledgements":[` + strings.Replace(good, `"venue"`, `"by":"me","venue"`, 1) + `]}`: "says who states it",
		`{"agent":"a","acknowledgements":[{"venue":"` + strings.Repeat("x", 200_000) + `"}]}`:                 "at most",
		`{`: "unexpected EOF",
	} {
		if status, text := post(body); status != http.StatusBadRequest || !strings.Contains(text, want) {
			t.Errorf("%.80s: %d %s, want something about %q", body, status, text, want)
		}
	}
	if status, text := post(`{"agent":"a","acknowledgements":[` + good + `]}`); status != http.StatusOK || !strings.Contains(text, string(scope.RuleAckTime)) {
		t.Errorf("an acknowledgement from before the order: %d %s", status, text)
	}
	var raw map[string]any
	if err := c.Get(t.Context(), "/v1/agent", &raw); err != nil {
		t.Fatal(err)
	}
	list, _ := raw["utilisation"].([]any)
	if len(list) != 2 || list[0].(map[string]any)["l"] != "max_open_orders" || list[0].(map[string]any)["used"] != "1" || list[1].(map[string]any)["used"] != "5000" {
		t.Errorf("the agent's utilisation: %v", list)
	}

	d = start(t, agent("a", self)+"operators:\n  - {user: '12345'}\n")
	_, err := client.New(d.socket).Acknowledge(t.Context(), "a", &scope.Acknowledgement{Venue: "XPAR", ClOrdID: "1", Status: scope.AckFilled})
	if p, ok := errors.AsType[*problem.Problem](err); !ok || p.Rule != "caller" {
		t.Errorf("an agent acknowledges its own orders: %v", err)
	}
}
