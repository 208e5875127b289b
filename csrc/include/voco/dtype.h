// Types of numbers, as bindings and launchers name them.
#pragma once

namespace voco {

enum class Dtype : int { kFloat16, kBFloat16, kFloat32, kInt8, kFloat8 };  // kFloat8 is e4m3 without infinities

}  // namespace voco
