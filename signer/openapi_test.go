package signer_test

import (
	"bytes"
	"context"
	"fmt"
	"io"
	"mime"
	"net"
	"net/http"
	"net/url"
	"reflect"
	"strings"
	"testing"

	"github.com/santhosh-tekuri/jsonschema/v6"

	"inkan/audit"
	"inkan/scope"
	"inkan/signer"
	"inkan/signer/client"
)

// TestOpenAPI: the signer answers as the document says that it serves: every
// operation that is in it, refusals too.
func TestOpenAPI(t *testing.T) {
	d, _, _ := controlled(t, "")
	h := &http.Client{Transport: &http.Transport{DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
		return new(net.Dialer).DialContext(ctx, "unix", d.socket)
	}}}
	answer := func(method, path, body string) (int, string, []byte) {
		t.Helper()
		r, err := http.NewRequestWithContext(t.Context(), method, "http://signer"+path, strings.NewReader(body))
		if err != nil {
			t.Fatal(err)
		}
		res, err := h.Do(r)
		if err != nil {
			t.Fatal(err)
		}
		defer res.Body.Close()
		b, err := io.ReadAll(res.Body)
		kind, _, _ := mime.ParseMediaType(res.Header.Get("Content-Type"))
		if err != nil {
			t.Fatal(err)
		}
		return res.StatusCode, kind, b
	}
	_, _, text := answer("GET", "/openapi.json", "")
	doc, err := jsonschema.UnmarshalJSON(bytes.NewReader(text))
	if err != nil {
		t.Fatal(err)
	}
	schemas := jsonschema.NewCompiler()
	schemas.AssertFormat()
	if err := schemas.AddResource("urn:signer", doc); err != nil {
		t.Fatal(err)
	}
	schema := func(names ...string) *jsonschema.Schema {
		var pointer strings.Builder
		for _, n := range names {
			pointer.WriteString("/" + strings.NewReplacer("~", "~0", "/", "~1").Replace(n))
		}
		s, err := schemas.Compile("urn:signer#" + (&url.URL{Fragment: pointer.String()}).EscapedFragment())
		if err != nil {
			t.Fatal(err)
		}
		return s
	}
	operations := make(map[string]bool)
	paths := doc.(map[string]any)["paths"].(map[string]any)
	for path, item := range paths {
		for method := range item.(map[string]any) {
			operations[strings.ToUpper(method)+" "+path] = true
		}
	}

	id := client.NewID()
	good := string(order(id))
	other := string(order(id, `"OrderQty":"100"`, `"OrderQty":"101"`))
	for _, c := range []struct {
		operation, path, body string
		status                int
	}{
		{"POST /v1/actions", "", good, 200},
		{"POST /v1/actions", "", other, 409},
		{"POST /v1/actions", "", string(order(client.NewID(), `"OrderQty":"100"`, `"OrderQty":"999999"`)), 403},
		{"POST /v1/actions", "", `{"a":1}`, 400},
		{"GET /v1/agent", "", "", 200},
		{"GET /v1/status", "", "", 200},
		{"POST /v1/kill", "", `{"scope":"venue","venue":"XETR","reason":"drill"}`, 200},
		{"POST /v1/kill", "", `{"scope":"agent","reason":"drill"}`, 400},
		{"GET /v1/status", "", "", 200}, // with a kill
		{"POST /v1/rearm", "", `{"document":"x"}`, 400},
		{"POST /v1/policy", "", `{"document":"x"}`, 400},
		{"POST /v1/acknowledgements", "", `{"agent":"a","acknowledgements":[{"venue":"XPAR","ClOrdID":"none","status":"filled","time":"2026-07-27T09:30:00.123456Z"}]}`, 200},
		{"POST /v1/acknowledgements", "", `{"agent":"b","acknowledgements":[]}`, 400},
		{"GET /v1/receipts/{id}", "/v1/receipts/" + id, "", 200},
		{"GET /v1/receipts/{id}", "/v1/receipts/" + client.NewID(), "", 404},
		{"GET /v1/receipts/{id}", "/v1/receipts/x", "", 400},
		{"GET /v1/checkpoint", "", "", 404},
		{"POST /v1/checkpoint", "", "", 200},
		{"GET /v1/checkpoint", "", "", 200},
		{"POST /v1/agents/{agent}/recovery", "/v1/agents/a/recovery", `{"reason":"none"}`, 409},
		{"POST /v1/agents/{agent}/recovery", "/v1/agents/a/recovery", `{}`, 400},
		{"POST /v1/agents/{agent}/recovery", "/v1/agents/b/recovery", `{"reason":"none"}`, 404},
		{"GET /v1/starts/{agent}", "/v1/starts/a", "", 403},
		{"POST /v1/starts", "", `{}`, 426},
		{"GET /healthz", "", "", 200},
		{"GET /openapi.json", "", "", 200},
	} {
		method, path, _ := strings.Cut(c.operation, " ")
		delete(operations, c.operation)
		at := c.path
		if at == "" {
			at = path
		}
		status, kind, b := answer(method, at, c.body)
		if status != c.status {
			t.Errorf("%s: %d, want %d: %s", c.operation, status, c.status, b)
		}
		item, _ := paths[path].(map[string]any)
		operation, _ := item[strings.ToLower(method)].(map[string]any)
		responses, _ := operation["responses"].(map[string]any)
		response, ok := responses[fmt.Sprint(status)].(map[string]any)
		if !ok {
			t.Errorf("%s: the document has no %d", c.operation, status)
			continue
		}
		content, _ := response["content"].(map[string]any)
		if content[kind] == nil {
			t.Errorf("%s: %d: the document has no answer of the kind %q", c.operation, status, kind)
			continue
		}
		if !strings.HasSuffix(kind, "json") {
			continue
		}
		v, err := jsonschema.UnmarshalJSON(bytes.NewReader(b))
		if err == nil {
			err = schema("paths", path, strings.ToLower(method), "responses", fmt.Sprint(status), "content", kind, "schema").Validate(v)
		}
		if err != nil {
			t.Errorf("%s: %d: %v\n%s", c.operation, status, err, b)
		}
	}
	for o := range operations {
		t.Errorf("%s was not asked", o)
	}

	// What is not always there has its place in the document too.
	components := doc.(map[string]any)["components"].(map[string]any)["schemas"].(map[string]any)
	properties := func(schema any) map[string]any { return schema.(map[string]any)["properties"].(map[string]any) }
	ofStatus := properties(components["status"])
	ofAgent := properties(ofStatus["agents"].(map[string]any)["items"])
	for _, c := range []struct {
		kind       reflect.Type
		properties map[string]any
	}{
		{reflect.TypeFor[signer.AgentInfo](), properties(components["agent"])},
		{reflect.TypeFor[signer.Status](), ofStatus},
		{reflect.TypeFor[signer.ClockStatus](), properties(ofStatus["clock"])},
		{reflect.TypeFor[signer.AgentStatus](), ofAgent},
		{reflect.TypeFor[signer.ReserveStatus](), properties(ofAgent["reserve"])},
		{reflect.TypeFor[audit.Anchoring](), properties(ofAgent["rollback"])},
		{reflect.TypeFor[signer.DeviceStatus](), properties(components["device"])},
		{reflect.TypeFor[scope.Utilisation](), properties(components["utilisation"])},
		{reflect.TypeFor[scope.Controls](), properties(components["controls"])},
		{reflect.TypeFor[signer.Receipt](), properties(components["receipt"])},
	} {
		for _, f := range reflect.VisibleFields(c.kind) {
			name, _, _ := strings.Cut(f.Tag.Get("json"), ",")
			if name != "" && c.properties[name] == nil {
				t.Errorf("%v: the document does not have %s", c.kind, name)
			}
		}
	}
}
