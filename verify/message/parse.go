package message

import (
	"fmt"

	"inkan/internal/strictjson"
)

// maxRoutes bounds a file of routes, in bytes.
const maxRoutes = 256 << 10

// Parse reads a list of routes in YAML or JSON, strictly: unknown and
// duplicate members are refused. Values such as "2" are quoted, since they are text.
func Parse(b []byte) (Routes, error) {
	var routes Routes
	if err := strictjson.UnmarshalYAML(b, maxRoutes, &routes); err != nil {
		return nil, fmt.Errorf("routes: %w", err)
	}
	for i := range routes {
		if err := routes[i].Validate(); err != nil {
			return nil, fmt.Errorf("route %d, %s %s: %w", i+1, routes[i].Method, routes[i].Path, err)
		}
	}
	return routes, nil
}
