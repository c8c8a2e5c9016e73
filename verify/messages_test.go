package verify_test

import (
	"crypto/sha256"
	"encoding/hex"
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"

	"inkan/internal/problem"
	"inkan/scope"
	"inkan/verify"
	"inkan/verify/message"
)

// TestMessages: the middleware compares the message with the action by a
// declared mapping, and a message that is refused does not use the action up.
func TestMessages(t *testing.T) {
	routes, err := message.Parse([]byte(`
- method: POST
  path: /orders
  kinds: [order.new]
  body:
    id: {field: ord.ClOrdID}
    isin: {field: ord.SecurityID}
    side: {field: ord.Side, values: {buy: "1"}}
    qty: {field: ord.OrderQty}
    price: {field: ord.Price}
  implied: {ord.SecurityIDSource: "4", ord.OrdType: "2", ord.Currency: EUR, ord.TimeInForce: "0"}
- {method: POST, path: /cancels, kinds: [order.cancel], opaque: true}
`))
	if err != nil {
		t.Fatal(err)
	}
	v := newVenue(t)
	v.config.Messages = routes
	got := 0
	h := v.receiver(t).Middleware(1000, http.HandlerFunc(func(http.ResponseWriter, *http.Request) { got++ }))
	signed := func(body string) string {
		sum := sha256.Sum256([]byte(body))
		return v.action(t, func(s *scope.Statement) {
			s.Native = &scope.Native{Format: scope.NativeHTTPBody, SHA256: hex.EncodeToString(sum[:])}
		})
	}
	send := func(jws, path, body string, change func(*http.Request)) (int, string) {
		req := httptest.NewRequest(http.MethodPost, path, strings.NewReader(body))
		req.Header = http.Header{"Content-Type": {"application/json"}, verify.Header: {jws}}
		if change != nil {
			change(req)
		}
		w := httptest.NewRecorder()
		h.ServeHTTP(w, req)
		return w.Code, problem.Parse(w.Code, w.Header().Get("Content-Type"), w.Body.Bytes()).Reason
	}
	const good = `{"id":"1","isin":"FR0000120271","side":"buy","qty":100,"price":50}`
	larger := strings.Replace(good, "100", "1000", 1)
	jws := signed(good)
	for _, c := range []struct {
		name, jws, path, body string
		change                func(*http.Request)
		status                int
		reason                verify.Reason
	}{
		{"another path, without an action", "", "/admin", good, func(r *http.Request) { r.Header.Del(verify.Header) }, 404, verify.ReasonRoute},
		{"a query", jws, "/orders?x=1", good, nil, 400, verify.ReasonRequest},
		{"a content coding", jws, "/orders", good, func(r *http.Request) { r.Header.Set("Content-Encoding", "gzip") }, 400, verify.ReasonRequest},
		{"another path", jws, "/admin", good, nil, 404, verify.ReasonRoute},
		{"a route for another kind", jws, "/cancels", good, nil, 403, verify.ReasonKind},
		{"a body that was not signed", jws, "/orders", larger, nil, 403, verify.ReasonBody},
		{"a small order over the digest of a large one", signed(larger), "/orders", larger, nil, 403, verify.ReasonMismatch},
		{"as it was signed", jws, "/orders", good, nil, 200, ""},
		{"again", jws, "/orders", good, nil, 409, verify.ReasonReplay},
	} {
		if status, reason := send(c.jws, c.path, c.body, c.change); status != c.status || reason != string(c.reason) {
			t.Errorf("%s: %d %s, want %d %s", c.name, status, reason, c.status, c.reason)
		}
	}
	if got != 1 {
		t.Errorf("%d requests came through, one was in order", got)
	}
}
