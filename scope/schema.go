package scope

import (
	"embed"
	"fmt"
)

//go:embed schema/*.json
var schemas embed.FS

// Schema returns the JSON Schema of a scope, an action or a statement.
func Schema(of string) ([]byte, error) {
	b, err := schemas.ReadFile("schema/" + of + ".schema.json")
	if err != nil {
		return nil, fmt.Errorf("there is no schema of %.32q: scope, action and statement have one", of)
	}
	return b, nil
}
